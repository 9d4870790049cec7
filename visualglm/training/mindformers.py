"""Reads the fine-tuning YAML of MindFormers r1.0: each key is taken over, or named as ignored with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from visualglm.errors import ConfigError
from visualglm.faults import brief
from visualglm.mindformers_yaml import Translation, flat_keys, reason_for

# What has its like here, and says the same.
_SAME = {
    "seed": "run.seed",
    "runner_config.batch_size": "run.batch_size",
    "runner_config.gradient_accumulation_steps": "run.accumulation",
    "runner_wrapper.max_grad_norm": "optimizer.max_grad_norm",
    "recompute_config.recompute": "run.activation_checkpointing",
    "train_dataset.data_loader.dataset_dir": "data.train",
    "train_dataset.num_parallel_workers": "data.workers",
    "lr_schedule.learning_rate": "optimizer.learning_rate",
    "lr_schedule.warmup_steps": "optimizer.warmup_steps",
    "lr_schedule.num_iters": "optimizer.decay_steps",
    "optimizer.betas": "optimizer.betas",
    "optimizer.eps": "optimizer.eps",
    "optimizer.weight_decay": "optimizer.weight_decay",
    "callbacks.CheckpointMonitor.save_checkpoint_steps": "run.checkpoint_every",
    "callbacks.CheckpointMonitor.keep_checkpoint_max": "run.keep_checkpoints",
    # As the first versions of these files have it.
    "callbacks.CheckpointMointor.save_checkpoint_steps": "run.checkpoint_every",
    "callbacks.CheckpointMointor.keep_checkpoint_max": "run.keep_checkpoints",
    "callbacks.MFLossMonitor.per_print_times": "run.log_every",
}
_SAME_PET = {
    "lora_rank": "tune.lora_rank",
    "lora_alpha": "tune.lora_alpha",
    "lora_dropout": "tune.lora_dropout",
    "layer_range": "tune.layer_range",
}
_SCHEDULES = {
    "CosineWithWarmUpLR": "cosine",
    "LinearWithWarmUpLR": "linear",
    "ConstantWarmUpLR": "constant",
}
# Styles of AnnealingLR; the last two are in its list, and leave the rate as it is.
_DECAYS = {
    "cosine": "annealing-cosine",
    "linear": "annealing-linear",
    "constant": "annealing-constant",
    "exponential": "annealing-constant",
    "none": "annealing-constant",
}
_METHODS = {"lora": "lora", "ptuning2": "ptuning"}
# What exclude_layers names and has no linear layers, here or there.
_NO_LAYERS = ("mixins",)
_NOT_EXCLUDED = "`mlp` alone is understood there; tune.target_modules and tune.layer_range say which layers get LoRA"

# Why a key is ignored; the first pattern that fits.
_REASONS = {
    "optimizer.type": "the optimiser is always AdamW",
    "run_mode trainer.* model.arch.* *.type": "it names classes and modes of MindFormers",
    "output_dir": "the folder is given as --output",
    "load_checkpoint *strategy* auto_trans_ckpt *checkpoint_name_or_path *vocab_file": (
        "weights and tokenizer come from the model directory that --model names"
    ),
    "resume_training": "--resume says so",
    "context.*": "the device is given as --device, and memory is taken as it is needed",
    "remote_save_url auto_tune filepath_prefix autotune_per_step profile* init_start_profile": (
        "cloud storage, autotuning and profiling belong to MindFormers"
    ),
    "runner_config.sink* runner_config.image_size": "batches are fed one by one",
    "runner_wrapper.scale_sense.*": "losses are scaled in float16 alone, beginning at 65536",
    "runner_wrapper.use_clip_grad": "gradients are always clipped, at optimizer.max_grad_norm",
    "use_parallel parallel.* parallel_config.* micro_batch_interleave_num": (
        "processes are given as --nproc and share the rows, and with `full` the weights too"
    ),
    "moe_config.*": "the model has no experts",
    "recompute_config.*": "recompute_config.recompute alone has its like",
    "do_eval *.do_eval eval_dataset* metric.* eval_callbacks*": (
        "rows are held out of those to train on (data.held_out), unless data.validation names others"
    ),
    "train_dataset_task.*": "it says again what train_dataset says",
    "train_dataset.batch_size *model_config.batch_size": "runner_config.batch_size says it",
    "train_dataset.*tokenizer.*": "the tokenizer comes with the model, and rows are as long as they are",
    "train_dataset.*column* train_dataset.*file_format train_dataset.data_loader.dataset_name": (
        "rows and their keys are recognised"
    ),
    "train_dataset.*shuffle *random_mapping train_dataset.*scale *drop_remainder train_dataset.*repeat *.seed": (
        "every row is seen once an epoch, in an order that run.seed decides"
    ),
    "train_dataset.*": "reading rows needs no more settings than data.workers",
    "*pet_config.target_modules": "the recipe there takes the linear layers of the attention whatever it says",
    "*pet_config.*": "the method that was chosen has no use for it",
    "*freeze_*": "all but LoRA stays as it is, as it does there; --method lora,qformer,vit trains more",
    "*top_k *top_p *repetition_penalty *do_sample *max_decode_length *use_past *is_*": (
        "it is about answering, not about training"
    ),
    "*model_config.text_config.compute_dtype": (
        "run.precision chooses what the device computes well in; --precision float16 asks for that"
    ),
    "*dtype *layernorm_compute_type *softmax_compute_type *param_init_type": (
        "run.precision is for the whole model, and norms, softmax and loss are in float32 anyway"
    ),
    "*dropout* *drop_path_rate": "nothing is dropped but inputs of LoRA (tune.lora_dropout)",
    "*model_config.* processor.*": "sizes and shapes are those of the model directory",
    "lr_schedule.total_steps": "the length of the run follows from epochs and num_iters",
    "lr_schedule.*": "the schedule has no such setting here; of AnnealingLR they are fixed at their defaults",
    "layer_scale layer_decay lr_scale*": "the learning rate is the same in all layers",
    "optimizer.*": "AdamW has no such setting here, and its rate is that of the schedule",
    "callbacks.*": "checkpoints, log and curve are always written",
}


def translate(values: Mapping[str, Any]) -> Translation:
    """Raises `ConfigError` for a schedule or a method that has no like here."""
    return _Translator(flat_keys(values)).run()


def _names_mlp(excluded: object) -> bool:
    """Whether an entry of exclude_layers, a name or a pattern such as ".*mlp.*", is about the MLP."""
    try:
        return "mlp" in str(excluded) or re.fullmatch(str(excluded), "mlp") is not None
    except re.error:
        return False


class _Translator:
    """Takes over one key after another; those that are left are ignored."""

    def __init__(self, keys: dict[str, Any]) -> None:
        self.left = keys
        self.done = Translation()

    def run(self) -> Translation:
        pet = next((key.partition("pet_config.")[0] for key in self.left if "pet_config." in key), "") + "pet_config."
        for key, here in (_SAME | {pet + name: here for name, here in _SAME_PET.items()}).items():
            if key in self.left:
                self.take(here, self.left[key], key)
        self.schedule()
        self.length_of_run()
        self.length_of_rows()
        self.betas()
        self.method(pet)
        self.excluded_layers(pet + "exclude_layers")
        self.precision()
        self.done.ignored |= {key: reason_for(key, _REASONS) for key in self.left}
        return self.done

    def take(self, here: str, value: object, *keys: str) -> None:
        part, _, name = here.partition(".")
        self.done.values.setdefault(part, {})[name] = value
        for key in keys:
            self.left.pop(key, None)
            earlier = self.done.taken.get(key)
            self.done.taken[key] = f"{earlier}, {here}" if earlier else here

    def schedule(self) -> None:
        kind, style = "lr_schedule.type", "lr_schedule.decay_style"
        if kind not in self.left:
            return
        name = self.left[kind]
        known = {"AnnealingLR": _DECAYS.get(str(self.left.get(style, "cosine")).lower())} | _SCHEDULES
        if known.get(str(name)) is None:
            wrong = f"{style} is {brief(self.left[style])}" if name == "AnnealingLR" else f"{kind} is {brief(name)}"
            raise ConfigError(
                f"{wrong}, which is not known here; it can be AnnealingLR with the decay_style cosine, linear or "
                f"constant, or {', '.join(_SCHEDULES)}."
            )
        self.take("optimizer.schedule", known[str(name)], *(key for key in (kind, style) if key in self.left))
        ratio = self.left.get("lr_schedule.decay_ratio")
        if isinstance(ratio, int | float) and ratio > 0:
            # There it is what the rate falls to, here what it is divided by.
            self.take("optimizer.decay_ratio", 1 / ratio, "lr_schedule.decay_ratio")

    def length_of_run(self) -> None:
        """There the rows are repeated until an epoch has num_iters steps."""
        epochs, steps = self.left.get("runner_config.epochs"), self.done.values.get("optimizer", {}).get("decay_steps")
        if isinstance(steps, int) and isinstance(epochs, int | None):
            keys = ("runner_config.epochs",) if epochs is not None else ()
            self.take("run.steps", steps * (1 if epochs is None else epochs), "lr_schedule.num_iters", *keys)
        elif epochs is not None:
            self.take("run.epochs", epochs, "runner_config.epochs")

    def length_of_rows(self) -> None:
        keys = [f"train_dataset.max_{side}_length" for side in ("source", "target")]
        lengths = [self.left.get(key) for key in keys]
        if all(isinstance(length, int) for length in lengths):
            self.take("data.max_length", sum(lengths), *keys)  # type: ignore[arg-type]

    def betas(self) -> None:
        keys = ["optimizer.beta1", "optimizer.beta2"]
        if all(key in self.left for key in keys):
            self.take("optimizer.betas", [self.left[key] for key in keys], *keys)

    def method(self, pet: str) -> None:
        kind, length = pet + "pet_type", pet + "pre_seq_len"
        if kind in self.left:
            method = _METHODS.get(str(self.left[kind]).lower())
            if method is None:
                raise ConfigError(
                    f"{kind} is {brief(self.left[kind])}, which is not known here; it can be {' or '.join(_METHODS)}."
                )
            self.take("tune.methods", [method], kind)
            if method == "ptuning" and length in self.left:
                self.take("tune.prefix_length", self.left[length], length)

    def excluded_layers(self, key: str) -> None:
        given = self.left.get(key)
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list):
            return
        without_mlp = any(map(_names_mlp, names))
        self.take("tune.target_modules", ["qkv", "proj"] if without_mlp else ["qkv", "proj", "fc1", "fc2"], key)
        strange = [name for name in names if name not in _NO_LAYERS and not _names_mlp(name)]
        self.done.ignored |= {f"{key} {brief(name)}": _NOT_EXCLUDED for name in strange}

    def precision(self) -> None:
        key = next((key for key in self.left if key.endswith("text_config.compute_dtype")), "")
        # What an Ascend card computes in says nothing about the device here.
        if key and self.left[key] != "float16":
            self.take("run.precision", self.left[key], key)
