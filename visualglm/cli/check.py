"""`visualglm check`: whether a model is whole, and whether it fits this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar, get_args

from typer import Argument, Exit

from visualglm.checkpoint.adapter_dir import AdapterManifest, open_adapter, require_finite
from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.files import file_pieces, hash_pieces, read_json_object
from visualglm.checkpoint.foreign import TOKENIZER as FOREIGN_TOKENIZER
from visualglm.checkpoint.foreign_config import HF_CONFIG, SAT_CONFIG
from visualglm.checkpoint.hf import read_hf
from visualglm.checkpoint.instead import holds_graphs, is_adapter, kind_instead, no_manifest, require_model_folder
from visualglm.checkpoint.listed_files import require_size
from visualglm.checkpoint.lite_dir import LiteDirectory, LiteManifest, is_lite_directory, open_lite_directory
from visualglm.checkpoint.lite_graphs import require_as_told
from visualglm.checkpoint.manifest import MANIFEST, MODEL, FileRecord, FolderKind, FolderManifest, Manifest
from visualglm.checkpoint.mindformers import read_mindformers
from visualglm.checkpoint.mindformers_keys import GLM
from visualglm.checkpoint.mindir_dir import (
    MindirDirectory,
    MindirManifest,
    is_mindir_directory,
    open_mindir_directory,
)
from visualglm.checkpoint.model_dir import CONFIG, TOKENIZER, open_model_directory, read_weights
from visualglm.checkpoint.progress import ByteProgress
from visualglm.checkpoint.sat import read_sat
from visualglm.cli.adapters import base_of
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import Quiet
from visualglm.config import DType, VisualGLMConfig
from visualglm.errors import CheckpointError, VisualGLMError
from visualglm.loading import builtin_path
from visualglm.memory import MemoryEstimate, available_memory, estimate_memory
from visualglm.parameters import parameter_count
from visualglm.processing.tokenizer import Tokenizer

GOOD, BAD, NEITHER = "✓", "✗", "–"

T = TypeVar("T")
M = TypeVar("M", bound=FolderManifest)


def check(
    model: Annotated[
        Path | None,
        Argument(metavar="MODEL", help="Model, export, adapter, or a checkpoint of another format; else the built-in."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Check a model: files, hashes, tensors, tokenizer, memory. The exit code is 1 if something is wrong."""
    path = builtin_path() if model is None else model
    if is_adapter(path):
        _conclude(_check_adapter(path, Messages(quiet)))
        return
    require_model_folder(path)
    read_foreign = _foreign_reader(path)
    if not (read_foreign or (path / MANIFEST).exists()) and (kind_instead(path) or not (path / CONFIG).exists()):
        raise no_manifest(path, MODEL)
    findings = Findings()
    if read_foreign:
        _check_foreign(path, read_foreign, findings)
    else:
        check_folder = next((check for is_one, check in _EXPORTS if is_one(path)), _check_model_directory)
        check_folder(path, findings, Messages(quiet))
    _conclude(findings)


class Findings:
    """One row for each thing that was looked at: a mark, what it is, and what was found."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    @property
    def is_bad(self) -> bool:
        return any(mark == BAD for mark, _, _ in self.rows)

    def add(self, mark: str, what: str, found: str) -> None:
        self.rows.append((mark, what, found))

    def attempt(self, what: str, action: Callable[[], T], describe: Callable[[T], str]) -> T | None:
        """The result of `action`; None, and the reason in a row, if it fails."""
        try:
            result = action()
        except VisualGLMError as error:
            self.add(BAD, what, str(error))
            return None
        self.add(GOOD, what, describe(result))
        return result


def _foreign_reader(path: Path) -> Callable[[Path], Checkpoint] | None:
    if (path / MANIFEST).exists():
        return None
    if (path / SAT_CONFIG.file_name).exists():
        return read_sat
    try:
        is_hf = HF_CONFIG.vision_section in read_json_object(path / HF_CONFIG.file_name)
    except CheckpointError:
        is_hf = False
    if is_hf:
        return read_hf
    return read_mindformers if (path / GLM).exists() else None


def _check_foreign(path: Path, read: Callable[[Path], Checkpoint], findings: Findings) -> None:
    checkpoint = findings.attempt("tensors", lambda: read(path), _describe_foreign)
    if checkpoint:
        _check_use(path / FOREIGN_TOKENIZER, checkpoint.config, findings)


def _describe_foreign(checkpoint: Checkpoint) -> str:
    config, source = checkpoint.config, checkpoint.source
    return (
        f"{source.format} checkpoint, {len(checkpoint.tensors):,} tensors of the right shapes, "
        f"{parameter_count(config):,} parameters, {config.dtype}, q, k and v packed as {source.layout}"
    )


def _check_model_directory(path: Path, findings: Findings, messages: Messages) -> None:
    _check_manifest(path, Manifest, lambda manifest: f"made from {manifest.source.format}", findings, messages)
    if findings.is_bad and holds_graphs(path):
        findings.add(NEITHER, "the rest", f"is that of an export, which cannot be checked without {MANIFEST}")
        return
    config = _check_config(path, findings)
    if config is None:
        return
    findings.attempt(
        "tensors", partial(read_weights, path, config), lambda tensors: f"{len(tensors):,}, all of the right shape"
    )
    if not findings.is_bad:
        # Without files in the manifest, all that it lists is right, and nothing was checked.
        findings.attempt("all listed", partial(open_model_directory, path), lambda _: f"{MANIFEST} lists all it needs")
    _check_use(path / TOKENIZER, config, findings)


def _check_lite_directory(path: Path, findings: Findings, messages: Messages) -> None:
    _check_export(path, LiteManifest, _open_lite, findings, messages)


def _check_mindir_directory(path: Path, findings: Findings, messages: Messages) -> None:
    _check_export(path, MindirManifest, _open_mindir, findings, messages)


_EXPORTS = ((is_lite_directory, _check_lite_directory), (is_mindir_directory, _check_mindir_directory))


def _check_export(
    path: Path,
    manifest_type: type[LiteManifest] | type[MindirManifest],
    open_export: Callable[[Path], LiteDirectory | MindirDirectory],
    findings: Findings,
    messages: Messages,
) -> None:
    kind = manifest_type.kind.name
    _check_manifest(path, manifest_type, lambda manifest: f"{kind}, {manifest.title}", findings, messages)
    config = _check_config(path, findings)
    if config is None:
        return
    _check_tokenizer(path / TOKENIZER, config, findings)
    if findings.is_bad:
        findings.add(NEITHER, "graphs", "not looked at, since what is above is wrong")
        return
    opened = findings.attempt("graphs", lambda: open_export(path), _describe_graphs)
    if opened:
        _check_memory("memory", opened.memory, findings)


def _describe_graphs(directory: LiteDirectory | MindirDirectory) -> str:
    graphs = [name for name in directory.manifest.files if name.endswith((".onnx", ".mindir"))]
    return f"{len(graphs)}, as the manifest tells"


def _open_lite(path: Path) -> LiteDirectory:
    directory = open_lite_directory(path)
    require_as_told(directory)
    return directory


def _open_mindir(path: Path) -> MindirDirectory:
    directory = open_mindir_directory(path)
    directory.require_harmless()
    return directory


def _conclude(findings: Findings) -> None:
    print_table(findings.rows)
    if findings.is_bad:
        raise Exit(1)


def _check_adapter(path: Path, messages: Messages) -> Findings:
    findings = Findings()
    if (path / MANIFEST).exists():
        _check_manifest(path, AdapterManifest, lambda it: f"adapter, made from {it.source.format}", findings, messages)
    adapter = findings.attempt(
        "tensors", lambda: open_adapter(path), lambda it: f"{len(it.tensors):,}, as they should be"
    )
    if adapter:
        findings.attempt("values", lambda: require_finite(adapter), lambda _: "all are finite numbers")
        findings.add(GOOD if adapter.knows_base else NEITHER, "model", base_of(adapter))
    return findings


def _check_manifest(
    path: Path, manifest_type: type[M], describe: Callable[[M], str], findings: Findings, messages: Messages
) -> None:
    """The manifest, and every file that it lists."""
    manifest = findings.attempt(MANIFEST, lambda: manifest_type.from_file(path / MANIFEST), describe)
    if manifest is None:
        return
    files = manifest.files
    with messages.byte_progress("hashing") as report:
        progress = ByteProgress(sum(record.size for record in files.values()), report)
        faults = progress.run(
            partial(_file_fault, path / name, manifest.kind, record, progress) for name, record in files.items()
        )
    for (name, record), fault in zip(files.items(), faults, strict=True):
        findings.add(BAD if fault else GOOD, name, fault or f"{record.size:,} bytes, hash as written")


def _file_fault(path: Path, kind: FolderKind, record: FileRecord, progress: ByteProgress) -> str | None:
    """What is wrong with a file, if something is."""
    try:
        require_size(path, record, kind)
        if hash_pieces(progress.track(file_pieces(path))) != record.sha256:
            return f"changed since it was written; {kind.remedy}"
    except CheckpointError as error:
        return str(error)
    return None


def _check_config(path: Path, findings: Findings) -> VisualGLMConfig | None:
    config = findings.attempt(
        "configuration",
        lambda: VisualGLMConfig.from_file(path / CONFIG),
        lambda config: f"{parameter_count(config):,} parameters, {config.dtype}",
    )
    if config is None:
        findings.add(NEITHER, "the rest", f"cannot be checked without {CONFIG}")
    return config


def _check_use(tokenizer: Path, config: VisualGLMConfig, findings: Findings) -> None:
    """What it takes to ask a model: its tokenizer, and memory."""
    _check_tokenizer(tokenizer, config, findings)
    for dtype in get_args(DType):
        _check_memory(f"memory, {dtype}", estimate_memory(config, dtype), findings)


def _check_tokenizer(tokenizer: Path, config: VisualGLMConfig, findings: Findings) -> None:
    if tokenizer.exists():
        findings.attempt("tokenizer", lambda: Tokenizer.for_model(tokenizer, config.text), _describe_tokenizer)
    else:
        findings.add(NEITHER, "tokenizer", f"no {tokenizer.name}: the model cannot be asked in words")


def _check_memory(what: str, estimate: MemoryEstimate, findings: Findings) -> None:
    free = available_memory()
    findings.add(GOOD if estimate.fits(free) else NEITHER, what, estimate.beside(free))


def _describe_tokenizer(tokenizer: Tokenizer) -> str:
    which = "the released ice_text.model" if tokenizer.is_released else "not the released one, but it fits"
    return f"{which}; {tokenizer.vocab_size:,} ids"
