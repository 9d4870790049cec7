import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visualglm.config import VisualGLMConfig
from visualglm.errors import DataError
from visualglm.processing.tokenizer import Tokenizer
from visualglm.training.batches import Batch, BatchSampler, ReadAhead, collate, read_by_threads, step_batches
from visualglm.training.examples import IGNORED_LABEL, ExampleDataset, plan_examples
from visualglm.training.rows import open_rows
from visualglm.training.torch.read_ahead import read_by_processes

ROWS = 23
SEED = 5
WAYS = pytest.mark.parametrize(("workers", "way"), [(0, read_by_threads), (2, read_by_threads), (2, read_by_processes)])


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_path: Path, tiny_config: VisualGLMConfig
) -> ExampleDataset:
    """Rows of unequal length, one example each; every third has no image."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = Tokenizer(tiny_tokenizer_path)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(ROWS):
            row = {"prompt": "what is it?", "label": "a cat " * (1 + number * number % 17)}
            if number % 3:
                Image.new("RGB", (30, 30), (10 * number, 0, 0)).save(folder / f"{number}.png")
                row["img"] = f"{number}.png"
            file.write(json.dumps(row) + "\n")
    index = open_rows(folder / "rows.jsonl")
    return ExampleDataset(index, plan_examples(index, tokenizer, tiny_config), tokenizer, tiny_config)


def sampler(dataset: ExampleDataset, rows_per_step: int = 4) -> BatchSampler:
    return BatchSampler(dataset.plan.lengths, rows_per_step, SEED)


def same(one: Batch, other: Batch) -> bool:
    arrays = [(batch.layout.input_ids, batch.layout.image_starts, batch.labels, batch.pixels) for batch in (one, other)]
    return one.rows == other.rows and all(map(np.array_equal, *arrays))


# --- one batch --------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_left_to_its_longest_row(
    dataset: ExampleDataset, tiny_config: VisualGLMConfig
) -> None:
    items = [dataset[number] for number in (1, 4, 3)]
    batch = collate(items, tiny_config.text)
    lengths = [len(item.example.input_ids) for item in items]
    assert batch.layout.input_ids.shape == batch.labels.shape == (3, max(lengths))
    for row, item in enumerate(items):
        pad = max(lengths) - lengths[row]
        assert batch.layout.pad_lengths[row] == pad
        assert batch.layout.input_ids[row, pad:].tolist() == item.example.input_ids.tolist()
        assert batch.labels[row].tolist() == [IGNORED_LABEL] * pad + item.example.labels.tolist()
        start = batch.layout.context_lengths[row] + pad
        assert batch.layout.input_ids[row, start] == tiny_config.text.bos_token_id
        assert (batch.labels[row, :start] == IGNORED_LABEL).all() and (batch.labels[row, start:] >= 0).all()
    assert batch.rows == (1, 4, 3)
    assert batch.pixels is not None and batch.image_embeds is None
    np.testing.assert_array_equal(
        batch.pixels, np.stack([item.pixels for item in items[:2] if item.pixels is not None])
    )
    assert batch.token_count == sum(int((item.example.labels >= 0).sum()) for item in items)


def test_a_batch_without_images_or_without_labels(dataset: ExampleDataset, tiny_config: VisualGLMConfig) -> None:
    text = collate([dataset[0], dataset[3]], tiny_config.text)
    assert text.pixels is None and text.image_embeds is None
    idle = collate([dataset[1]], tiny_config.text, learns=False)
    assert idle.rows == () and idle.token_count == 0 and idle.layout.batch_size == 1


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, rows_per_step", [(23, 4), (24, 4), (3, 4), (1, 1), (1000, 8), (1001, 16)])
def test_every_example_comes_once_an_epoch(count: int, rows_per_step: int) -> None:
    lengths = np.random.default_rng(0).integers(10, 200, count)
    order = BatchSampler(lengths, rows_per_step, SEED)
    steps = order.steps_per_epoch
    assert steps == int(np.ceil(count / rows_per_step))
    epochs = [[order.step(epoch * steps + step) for step in range(steps)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(count))
        assert [len(step) for step in epoch[:-1]] == [rows_per_step] * (steps - 1)
        assert all((np.diff(lengths[step]) >= 0).all() for step in epoch)
    if count > 20:
        assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()
        assert {frozenset(step.tolist()) for step in epochs[0]} != {frozenset(step.tolist()) for step in epochs[1]}


def test_a_step_depends_on_seed_and_number_alone() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 103)
    walked = BatchSampler(lengths, 8, SEED)
    steps = [walked.step(step).tolist() for step in range(40)]
    for step in (39, 0, 13, 12, 26, 14):
        assert BatchSampler(lengths, 8, SEED).step(step).tolist() == walked.step(step).tolist() == steps[step]
    assert BatchSampler(lengths, 8, SEED + 1).step(0).tolist() != steps[0]


def test_little_of_a_batch_is_padding() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.3, 0.6, 5000), 45, 500).astype(np.int64)

    def padding(batches: Sequence[np.ndarray]) -> float:
        padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
        return 1 - int(lengths.sum()) / padded

    order = BatchSampler(lengths, 16, SEED)
    bucketed = [batch for step in range(order.steps_per_epoch) for batch in np.array_split(order.step(step), 4)]
    shuffled = np.array_split(np.random.default_rng(1).permutation(5000), 1250)
    assert padding(bucketed) < 0.01
    assert padding(shuffled) > 0.3
    assert 1 - int(lengths.sum()) / (len(lengths) * 500) > 0.8  # padded to a fixed length


# --- processes --------------------------------------------------------------------------------------------------------


def run(dataset: ExampleDataset, world_size: int, batch_size: int, **options: int) -> list[list[list[Batch]]]:
    """The batches of each process, step by step, for two epochs."""
    order = sampler(dataset)
    stop = 2 * order.steps_per_epoch
    return [
        list(
            step_batches(
                dataset,
                order,
                stop_step=stop,
                rank=rank,
                world_size=world_size,
                batch_size=batch_size,
                **options,
            )
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (2, 2), (1, 1), (2, 1), (4, 1), (1, 2)])
def test_the_rows_of_a_step_are_the_same_however_they_are_shared(
    dataset: ExampleDataset, world_size: int, batch_size: int
) -> None:
    order = sampler(dataset)
    ranks = run(dataset, world_size, batch_size)
    assert order.steps_per_epoch == 6 and all(len(steps) == 12 for steps in ranks)
    for step in range(12):
        shares = [rank[step] for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        rows = [row for share in shares for batch in share for row in batch.rows]
        assert sorted(rows) == sorted(dataset.plan.rows[order.step(step)])
        assert all(len(batch.rows) <= batch_size for share in shares for batch in share)
        tokens = sum(batch.token_count for share in shares for batch in share)
        labels = [dataset[int(number)].example.labels for number in order.step(step)]
        assert tokens == sum(int((row >= 0).sum()) for row in labels)
    assert sum(len(step) == 4 // (world_size * batch_size) for step in ranks[0]) >= 10


def test_a_process_without_rows_has_a_batch_that_counts_for_nothing(dataset: ExampleDataset) -> None:
    first, second, third, fourth = (steps[5] for steps in run(dataset, 4, 1))  # the last of the epoch, of three rows
    assert [len(share[0].rows) for share in (first, second, third, fourth)] == [1, 1, 1, 0]
    assert fourth[0].token_count == 0 and fourth[0].layout.batch_size == 1


@WAYS
def test_a_run_goes_on_from_any_step_as_if_never_stopped(dataset: ExampleDataset, workers: int, way: ReadAhead) -> None:
    whole = run(dataset, 1, 2)[0]
    for start in range(12) if not workers else (0, 4, 6, 11):
        rest = step_batches(
            dataset,
            sampler(dataset),
            start_step=start,
            stop_step=12,
            batch_size=2,
            workers=workers,
            read_ahead=way,
        )
        for expected, found in zip(whole[start:], rest, strict=True):
            assert len(expected) == len(found) and all(map(same, expected, found))


def test_threads_read_only_as_far_ahead_as_they_must() -> None:
    asked: list[int] = []

    def things() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    found = read_by_threads(lambda number: number + 1, things(), 2)
    assert [next(found), next(found)] == [1, 2]
    assert len(asked) < 10


# --- faults -----------------------------------------------------------------------------------------------------------


@WAYS
def test_a_row_that_cannot_be_read_is_one_sentence(
    dataset: ExampleDataset, workers: int, way: ReadAhead, request: pytest.FixtureRequest
) -> None:
    image = dataset.index.path.parent / "4.png"
    hidden = image.rename(image.with_suffix(".hidden"))
    request.addfinalizer(lambda: hidden.rename(image))
    with pytest.raises(DataError) as raised:
        list(step_batches(dataset, sampler(dataset), stop_step=6, batch_size=4, workers=workers, read_ahead=way))
    assert str(raised.value) == (f"{dataset.index.path}, line 5: The image {image} does not exist; check the path.")
