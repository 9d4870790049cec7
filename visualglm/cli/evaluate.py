"""`visualglm evaluate`: how well a model, or an adapter, answers the questions of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

from visualglm.cli.batches import keep_batches, told_if_interrupted
from visualglm.cli.loading import choose_model, load_choice
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.mindformers import with_config
from visualglm.cli.options import GenerationOptions, ImageOptions, ModelOptions
from visualglm.cli.row_log import RowLog, require_apart, sidecar_of
from visualglm.errors import DataError
from visualglm.evaluation.evaluate import Evaluator
from visualglm.evaluation.metrics import has_bleu
from visualglm.evaluation.questions import Question, read_questions
from visualglm.evaluation.report import Column, is_report, write_report
from visualglm.evaluation.results import Result, read_results
from visualglm.evaluation.scores import Scored
from visualglm.evaluation.tables import comparison_table, score_table
from visualglm.loading import Choice


def evaluate(
    data: Annotated[Path, Argument(metavar="DATA", help="JSONL file or JSON list of rows with labels.")],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FILE", help="JSONL file that a result for each row goes to.")
    ] = None,
    html: Annotated[
        Path | None, Option(metavar="FILE", help="Page that shows pictures, questions and answers.")
    ] = None,
    compare: Annotated[
        Path | None, Option(metavar="FILE", help="Results of an earlier evaluation of DATA: what has changed?")
    ] = None,
    batch_size: Annotated[int, Option(metavar="N", min=1, max=65_536, help="Rows answered at once.")] = 16,
    no_loss: Annotated[bool, Option("--no-loss", help="Leave out loss and perplexity: quicker.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Begin anew instead of going on.")] = False,
    strict: Annotated[bool, Option("--strict", help="Exit with 1 if a row has an error.")] = False,
    *,
    options: ModelOptions,
    generation: GenerationOptions,
) -> None:
    """Ask a model the questions of DATA and compare its answers with the labels.

    A row of DATA is {"img": FILE, "prompt": TEXT, "label": TEXT or a list of them}, or has "conversations", as for
    finetune; paths are relative to DATA. With --output the same command goes on where it was stopped.
    """
    messages = Messages(options.quiet)
    options, generation = with_config(options, generation, messages)
    generation.config()
    _check_files(data, output, html, compare)
    with messages.row_progress("checking rows") as report:
        questions = read_questions(data, report)
    before = None if compare is None else Scored(read_results(compare, questions))
    choice = choose_model(options, messages)
    run = _Run(choice, generation.fitted(choice.config.text), questions, batch_size, not no_loss, messages)
    after = Scored(run.in_memory() if output is None else run.logged(output, options, overwrite=overwrite))
    if not has_bleu():
        messages.tell("There is no BLEU-4 without sacrebleu; run `pip install 'visualglm[evaluate]'`")
    table = score_table(after) if before is None else comparison_table(before, after)
    print_table(table.rows, table.header)
    if html is not None:
        columns = [Column(str(output or choice.name), after)]
        if before is not None:
            columns.insert(0, Column(str(compare), before))
        with messages.row_progress("drawing the page") as report:
            write_report(html, f"{choice.name} on {data.name}", questions, columns, table, report)
        messages.tell(f"written: {html}")
    failed = sum(result.answer is None for result in after.results)
    if failed:
        messages.tell(f"{failed:,} of {len(questions):,} rows have an error and are in no figure")
    if strict and failed:
        raise Exit(1)


def _check_files(data: Path, output: Path | None, html: Path | None, compare: Path | None) -> None:
    """Nothing that is read, or written by another option, is to be written over."""
    if output is not None:
        require_apart(output, data, *([] if compare is None else [compare]))
    if html is None:
        return
    if html.is_dir() or not html.parent.is_dir():
        raise DataError(f"{html} cannot be written; give the name of a file in a folder that is there as --html.")
    if output is not None and html.resolve() in (output.resolve(), sidecar_of(output).resolve()):
        raise DataError(f"{html} is for the results; give another name as --html.")
    if html.exists() and not is_report(html):
        raise DataError(f"{html} is no page of an evaluation, so it is not replaced; give another name as --html.")


class _Run:
    """One evaluation, whether its results are kept in a file or not."""

    def __init__(
        self,
        choice: Choice,
        generation: GenerationOptions,
        questions: list[Question],
        batch_size: int,
        with_loss: bool,
        messages: Messages,
    ) -> None:
        self._choice = choice
        self._generation = generation
        self._questions = questions
        self._batch_size = batch_size
        self._with_loss = with_loss
        self._messages = messages

    def in_memory(self) -> list[Result]:
        """The results, kept nowhere."""
        rows: list[dict[str, Any]] = []
        self._answer(rows.extend, 0)
        return [Result.from_values(f"row {number}", row) for number, row in enumerate(rows, 1)]

    def logged(self, output: Path, options: ModelOptions, *, overwrite: bool) -> list[Result]:
        """The results in `output`, after those that are missing there were added."""
        origin = {
            "model": self._choice.fingerprint,
            "backend": options.backend,
            "dtype": options.dtype,
            "loss": self._with_loss,
            **self._generation.keywords(),
        }
        total = len(self._questions)
        with RowLog(output, origin, overwrite=overwrite) as log:
            done = len(log.resume(question.named() for question in self._questions))
            if done:
                self._messages.tell(f"{output} has {done:,} of {total:,} rows already")
            with told_if_interrupted(log, total, self._messages):
                self._answer(log.append, done)
        return read_results(output, self._questions)

    def _answer(self, keep: Any, done: int) -> None:
        if done == len(self._questions):
            return
        model = load_choice(self._choice, ImageOptions(), self._messages)
        evaluator = Evaluator(model, with_loss=self._with_loss, **self._generation.keywords())
        results = evaluator.results(self._questions, self._batch_size, done)
        keep_batches(results, keep, done, len(self._questions), self._messages)
