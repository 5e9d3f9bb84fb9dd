"""SegmentTrainer: transformers' Trainer for documents longer than a step.

Each batch row is a lane that reads documents segment after segment (lanes.py). The model's cache goes from step to
step, so a model with memory trains on context that reaches back before the step; a row of the cache is reset where its
lane starts another document. Gradients stop between steps, or after as many as backpropagate_segments says.
Everything else is transformers' Trainer: optimizer, schedulers, mixed precision, accumulation, checkpoints, callbacks
and logging are its own.

    training     self._training.cache    -> training_step -> self._training.cache     over all steps of an epoch
    evaluation   self._evaluation.cache  -> prediction_step -> ...                    over one evaluation, then dropped

What is overridden, and why, stands at each method.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import write_json
from ..models.cache import GalleryCache, cache_of
from .checkpoints import CACHE_FILE, LANES_FILE, TRAINER_STATE, NotWholeError, check_whole, newest_whole, read_lanes
from .lanes import IGNORED, DocumentLanes

# Entries of a model's config that do not decide what its weights and its cache mean, or that Trainer itself changes.
VOLATILE = {
    "transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip


class SegmentTrainer(Trainer):
    """Trains and evaluates a causal model on long documents, segment by segment, with its cache carried along.

    model, args and further keyword arguments: as transformers.Trainer. `train_dataset` and `eval_dataset` hold one
        tokenised document per row, in a column `input_ids` (list of int, any length); other columns are ignored.
        The model's forward takes `past_key_values` and `shift_labels`, and its cache has `reset_rows`, `detach`,
        `save` and `load`, as all causal models of the gallery do.
    args.per_device_train_batch_size: lanes of each process (B). args.per_device_eval_batch_size: the same for
        evaluation, where it changes speed but not results. args.data_seed, else args.seed: of the shuffle.
        args.train_sampling_strategy: "random" or "sequential".
    segment_length: tokens that a lane reads in a step (L). Default: the model config's segment_length.
    backpropagate_segments: steps that a gradient passes back through, in windows that lie side by side (truncated
        backpropagation through time): the gradients of one forward over that many segments. All of a window's graph is
        in memory until its last step, activations included unless args.gradient_checkpointing has them computed again.
        Weights must not change within a window, so it divides args.gradient_accumulation_steps; an update that the
        end of an epoch cuts short ends its window. What the paper stops within a forward stays stopped, see
        GalleryCache. 1: gradients stop between steps.
    predict_eos: the last token of a document predicts config.eos_token_id; otherwise it predicts nothing.

    A batch holds input_ids, attention_mask and shift_labels (B, L); shift_labels[b, t] is the token after
    input_ids[b, t] in its document, even where that one stands in the next step, so every token but a document's
    first is predicted once an epoch. `labels` is the same tensor, for compute_loss_func and compute_metrics.
    In transformers' logs a sample is one segment of one lane.

    Several processes (torchrun, accelerate launch): the documents are dealt over world_size * lanes lanes, by length,
    see DocumentLanes. All processes take the same number of steps; one that runs dry before the others gets batches
    of padding, which count for nothing. The loss is the mean over all tokens of an update, on all processes and
    accumulation steps (num_items_in_batch), if args.average_tokens_across_devices is left on.

    Evaluation carries a cache of its own. It reports `eval_loss`, the mean over all predicted tokens, `eval_tokens`,
    their number, and `eval_bits_per_token`; with a byte-level tokenizer as processing_class also
    `eval_bits_per_byte`, which is the same number. (No bits with label smoothing or a compute_loss_func, whose loss
    is no likelihood.)

    Checkpoints hold, beside the Trainer's own files, lanes_RANK.json (setup and position) and lanes_RANK.safetensors
    (cache) of each process. train(resume_from_checkpoint=...) goes on from there bit for bit.

    Carrying states from step to step is the training of Dai et al. 2019 (Transformer-XL, section 3.2; mems in train.py
    of the official code). Their stream of tokens has no documents, so no row is reset there.

    Raises ValueError for arguments that have no meaning here (data_collator, dataloader_drop_last, batch_eval_metrics,
    torch.nn.DataParallel, tensor, context and sequence parallelism; DeepSpeed and FSDP with backpropagate_segments
    above 1), from train() for a checkpoint of another setup,
    before anything is changed, and for a model whose cache cannot be carried. RuntimeError for batches that
    come out of order.
    """

    model: Any  # Trainer's type of it is wider than what it accepts

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        segment_length: int | None = None,
        backpropagate_segments: int = 1,
        predict_eos: bool = False,
        **kwargs: Any,
    ):
        if kwargs.get("data_collator") is not None:
            raise ValueError(
                "data_collator is given; SegmentTrainer makes its own batches from lanes, so leave it out"
            )
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(model, args, **kwargs)
        if use_cache is not None:
            # Trainer switches it off, for models that train without a past. Ours train with it, and a checkpoint that
            # says use_cache=False would forget its past when it is loaded.
            self.model.config.use_cache = use_cache
        self._refuse_what_lanes_cannot_do()
        if self.label_smoother is not None:
            self.label_smoother = _SmoothInPlace(self.label_smoother.epsilon)
        config = self.model.config
        length = segment_length if segment_length is not None else getattr(config, "segment_length", None)
        if not isinstance(length, int) or length < 1:
            raise ValueError(
                f"segment_length is {length!r}; it counts the tokens that a lane reads in a step, so "
                "give SegmentTrainer(segment_length=...) an int of 1 or more (its default is the model config's)"
            )
        self.segment_length: int = length
        self.backpropagate_segments = self._check_window(backpropagate_segments)
        self._eos_token_id = self._eos_of(config) if predict_eos else None
        self._training = _Carried()
        self._evaluation: _Carried | None = None
        self._train_lanes: DocumentLanes | None = None

    def _no_cache(self, kind: str) -> ValueError:
        return ValueError(
            f"model is a {type(self.model).__name__}, whose past_key_values is a {kind} without "
            "reset_rows() and detach(); give a model with a GalleryCache, or use transformers.Trainer"
        )

    def _refuse_what_lanes_cannot_do(self):
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if hasattr(model, "can_generate") and not model.can_generate():
            raise self._no_cache("NoneType")
        adapter = getattr(self.model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"model is tuned by {type(adapter).__name__}, whose virtual tokens PEFT puts before every segment of "
                "a document, or in place of its cache; use LoRA, or transformers.Trainer on whole documents"
            )
        args = self.args
        if args.n_gpu > 1:
            raise ValueError(
                f"this process sees {args.n_gpu} GPUs and would split each batch over them (DataParallel), which "
                "parts the lanes from their cache; start one process per GPU with "
                f"`torchrun --nproc-per-node {args.n_gpu} ...`, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        for kind, size in (
            ("tensor", self.get_tp_size()),
            ("context", self.get_cp_size()),
            ("sequence", self.get_sp_size()),
        ):
            if size > 1:
                raise ValueError(
                    f"{kind} parallelism over {size} processes is not served: each process has its own lanes"
                )
        if args.dataloader_drop_last:
            raise ValueError("dataloader_drop_last is True; lanes have no last batch to drop, so leave it False")
        if args.batch_eval_metrics:
            raise ValueError("batch_eval_metrics is True; metrics are computed at the end here, so leave it False")
        if args.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy is {args.train_sampling_strategy!r}; lanes are read in 'random' or "
                "'sequential' order, and always balanced by length"
            )

    def _check_window(self, segments: Any) -> int:
        steps = self.args.gradient_accumulation_steps
        if not isinstance(segments, int) or isinstance(segments, bool) or segments < 1:
            raise ValueError(
                f"backpropagate_segments is {segments!r}; it counts the steps that a gradient passes back through, so "
                "give an int of 1 or more"
            )
        if steps % segments:
            raise ValueError(
                f"backpropagate_segments is {segments} and gradient_accumulation_steps {steps}: weights must not "
                "change between steps that one gradient passes through; set gradient_accumulation_steps to a multiple "
                f"of {segments}"
            )
        if segments > 1 and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"backpropagate_segments is {segments} under {'DeepSpeed' if self.is_deepspeed_enabled else 'FSDP'}, "
                "which wants a backward after each forward; leave it at 1 and give a larger segment_length, or train "
                "with DistributedDataParallel"
            )
        return segments

    @staticmethod
    def _eos_of(config):
        eos = config.eos_token_id
        eos = eos[0] if isinstance(eos, (list, tuple)) else eos
        if eos is None:
            raise ValueError(
                "predict_eos is True, but the model config's eos_token_id is None; set it, or predict_eos=False"
            )
        return eos

    # ---- batches

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs) -> DataLoader:
        """Lanes in place of samplers, for training, evaluation and prediction alike. It is not prepared by accelerate,
        which would deal the batches over the processes a second time; Trainer moves batches to the device itself."""
        lanes = self._train_lanes if is_training else None
        if lanes is None or lanes.lanes != batch_size:  # other than planned: auto_find_batch_size
            lanes = self._make_lanes(dataset, batch_size, is_training)
        if is_training:
            self._train_lanes = lanes
            self._training.cut()  # auto_find_batch_size: what an attempt that failed has left
        return _LaneLoader(lanes, self.args)

    def _make_lanes(self, dataset, lanes: int, is_training: bool) -> DocumentLanes:
        args = self.args
        pad = self.model.config.pad_token_id
        return DocumentLanes(
            dataset,
            lanes=lanes,
            segment_length=self.segment_length,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            shuffle=is_training and args.train_sampling_strategy == "random",
            eos_token_id=self._eos_token_id,
            pad_token_id=0 if pad is None else pad,
            rank=args.process_index,
            world_size=args.world_size,
        )

    # ---- the cache from step to step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As Trainer's, with the cache: its rows are reset as the batch says, it goes into the forward, and what comes
        out is kept. Training and evaluation both pass here, each with a cache of its own. The loss of a step within a
        window has no gradient: the window's last has those of all its steps."""
        inputs = dict(inputs)
        reset, position, following = inputs.pop("reset"), tuple(inputs.pop("position")), tuple(inputs.pop("following"))
        evaluating = self._evaluation is not None
        carried = self._evaluation or self._training
        if bool(reset.all()):
            carried.cache = None  # nothing goes on: begin anew, and let go of columns that no row needs
        elif carried.cache is None or carried.position != position:
            raise RuntimeError(
                f"the batch is of (epoch, step) {position}, the cache belongs before {carried.position}: batches must "
                "come in order, from the first of an epoch or of a resumed checkpoint"
            )
        else:
            carried.cache.reset_rows(reset)
        if evaluating:
            num_items_in_batch = None  # the mean over this batch; evaluation_loop weighs it by its tokens
        elif num_items_in_batch is not None:
            # 0 where this process ran dry and tokens are not counted over all of them: 0 / 0 would end the training
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        windowed = not evaluating and self.backpropagate_segments > 1
        if windowed and carried.cache is None:
            carried.cache = GalleryCache(self.model.config)
        if windowed:
            carried.cache.detaches = False
        shift_labels = inputs["shift_labels"]
        if self._computes_loss:
            del inputs["shift_labels"]  # Trainer takes `labels` out too, so the model gives logits and no loss
        loss, outputs = super().compute_loss(
            model,
            {**inputs, "past_key_values": carried.cache, "use_cache": True},
            return_outputs=True,
            num_items_in_batch=num_items_in_batch,
        )
        cache = cache_of(outputs) if isinstance(outputs, dict) else None
        if cache is None or not (hasattr(cache, "reset_rows") and hasattr(cache, "detach")):
            raise self._no_cache(type(cache).__name__)
        carried.cache, carried.position = cache, following
        if windowed:
            loss = carried.within_window(loss)
        # An update's last step ends a window, a short one perhaps at the end of an epoch.
        if not windowed or carried.steps == self.backpropagate_segments or self.accelerator.sync_gradients:
            carried.cut()
        else:
            loss = loss.detach().requires_grad_()  # Trainer's backward of it reaches nothing
        if evaluating:
            tokens = int((shift_labels != IGNORED).sum())
            if tokens == 0:
                loss = torch.zeros_like(loss)  # a mean over nothing is NaN
            carried.loss += float(loss) * tokens
            carried.tokens += tokens
        return (loss, outputs) if return_outputs else loss

    @property
    def _computes_loss(self) -> bool:
        """Tells whether Trainer computes the loss from logits, and not the model."""
        return self.label_smoother is not None or self.compute_loss_func is not None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As Trainer's, with a cache of its own, and with the mean loss over tokens: Trainer takes the mean over
        steps, which weighs a token by how full its step was and so depends on the number of lanes."""
        self._evaluation = carried = _Carried()
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            total = torch.tensor([[carried.loss, carried.tokens]], dtype=torch.float64)
        finally:
            self._evaluation = None
        if self.args.world_size > 1:
            total = self.accelerator.gather(total.to(self.args.device)).cpu()
        loss, tokens = total.sum(0).tolist()
        metrics = {"loss": loss / tokens, "tokens": int(tokens)}
        if not self._computes_loss:
            metrics["bits_per_token"] = metrics["loss"] / math.log(2)
            if _is_byte_level(self.processing_class):
                metrics["bits_per_byte"] = metrics["bits_per_token"]
        own = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics=(output.metrics or {}) | own)

    # ---- checkpoints

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As Trainer's. First lanes are planned, and a checkpoint is compared with this setup, while nothing has been
        loaded yet.

        resume_from_checkpoint: a folder, or True for the newest whole checkpoint in args.output_dir (a warning names
        what is passed over, see checkpoints.py). Raises ValueError if it is not whole, or was written in another
        setup: other lanes, processes, segment_length, gradient_accumulation_steps, seed, order, predict_eos, documents
        or model config.
        """
        if self.train_dataset is not None:  # else Trainer says what is missing
            folder = self._checkpoint_to_resume(resume_from_checkpoint)
            state = None if folder is None else self._read_lanes(folder)
            count = self._train_batch_size
            if state is not None and self.args.auto_find_batch_size:
                count = state["setup"]["per_device_train_batch_size"]  # as Trainer will
            lanes = self._make_lanes(self.train_dataset, count, is_training=True)
            carried = _Carried() if folder is None or state is None else self._resumed(folder, state, lanes)
            self._train_lanes, self._training = lanes, carried
            if folder is not None:
                resume_from_checkpoint = folder
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model, trial):
        """As Trainer's. What an earlier run left of a checkpoint of this step is not whole from now on: a kill would
        leave files of both."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        """Also writes this process's lanes and cache. Here, because Trainer calls it on every process, after the
        weights and before trainer_state.json, which makes a checkpoint whole, and not if args.save_only_model."""
        super()._save_rng_state(output_dir)
        names = {"rank": self.args.process_index}
        cache, lanes = self._training.cache, self._train_lanes
        assert lanes is not None, "train() makes the lanes before it saves"
        if cache is not None:
            cache.save(os.path.join(output_dir, CACHE_FILE.format(**names)))
        state = {
            "position": self._training.position,
            "setup": self._setup(lanes),
            "config": _comparable(self.model.config),
            "cache": cache is not None,
        }
        write_json(Path(output_dir) / LANES_FILE.format(**names), state)

    def _setup(self, lanes: DocumentLanes) -> dict[str, Any]:
        """Values that must stay the same for a run to be resumed, under the names of the arguments that set them."""
        setup = lanes.setup()
        return {
            "per_device_train_batch_size": setup["lanes"],
            "world_size": setup["world_size"],
            "segment_length": setup["segment_length"],
            "backpropagate_segments": self.backpropagate_segments,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "seed": setup["seed"],
            "train_sampling_strategy": self.args.train_sampling_strategy,
            "predict_eos": setup["eos_token_id"],
            "train_dataset": setup["documents"],
            "dtype": str(self.model.dtype),
        }

    def _checkpoint_to_resume(self, resume_from_checkpoint) -> str | None:
        if resume_from_checkpoint is None or resume_from_checkpoint is False:
            return None
        if self.args.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip is True, which begins the epoch anew; the cache in a checkpoint belongs to its "
                "step, so leave ignore_data_skip False to resume"
            )
        output_dir = str(self.args.output_dir)
        if resume_from_checkpoint is not True:
            folder = os.fspath(resume_from_checkpoint)
            try:
                check_whole(folder)
            except NotWholeError as error:
                raise ValueError(
                    f"resume_from_checkpoint is {folder!r}, which is no whole checkpoint of a SegmentTrainer: it "
                    f"{error}; give an earlier one, or True for the newest whole one in {output_dir!r}, or load its "
                    "weights with from_pretrained and begin anew"
                ) from error
            return folder
        newest = newest_whole(output_dir)
        if newest is None:
            raise ValueError(
                f"resume_from_checkpoint is True, but {output_dir!r} holds no whole checkpoint; give a folder, or "
                "False to begin anew"
            )
        return newest

    def _read_lanes(self, folder: str) -> dict[str, Any]:
        """The lanes that this process wrote, or the last process's if there were fewer then, which the setup says."""
        processes = read_lanes(folder, 0)["setup"]["world_size"]
        return read_lanes(folder, min(self.args.process_index, processes - 1))

    def _resumed(self, folder: str, state: dict[str, Any], lanes: DocumentLanes) -> _Carried:
        """Position and cache of a checkpoint, once its setup has been found to be this one."""
        written = f"but checkpoint {folder!r} was written with"
        anew = "or begin anew without resume_from_checkpoint"
        for name, now in self._setup(lanes).items():
            then = state["setup"].get(name, 1 if name == "backpropagate_segments" else None)  # as it was before
            if then == now:
                continue
            remedy = {
                "world_size": f"start {then} processes (torchrun --nproc-per-node {then})",
                "train_dataset": "pass the documents that it was trained on, in the same order",
                "predict_eos": f"pass predict_eos={then is not None}, with config.eos_token_id {then}",
                "dtype": f"load the model with dtype={then!r}",
            }.get(name, f"set {name}={then!r}")
            raise ValueError(f"{name} is {now!r}, {written} {then!r}; {remedy}, {anew}")
        config = _comparable(self.model.config)
        for name in sorted({*config, *state["config"]}):
            then, now = state["config"].get(name), config.get(name)
            if then != now:
                raise ValueError(
                    f"{name} is {now!r} in the model's config, {written} {then!r}; build the model with "
                    f"from_pretrained({folder!r}), {anew}"
                )
        cache = None
        if state["cache"]:
            path = os.path.join(folder, CACHE_FILE.format(rank=self.args.process_index))
            # Of the checkpoint's own weights, which may lie sharded over processes. safetensors knows no "cpu:0".
            cache = GalleryCache.load(path, any_weights=True).to(self.args.device)
        return _Carried(cache, tuple(state["position"]))


class _SmoothInPlace(LabelSmoother):
    """Trainer's label smoothing, which shifts the labels of a causal model, for labels that lanes have shifted."""

    def __call__(self, model_output, labels, shift_labels=False, num_items_in_batch=None):
        return super().__call__(model_output, labels, num_items_in_batch=num_items_in_batch)


@dataclass
class _Carried:
    """State carried from one step to the next."""

    cache: Any = None
    position: tuple[int, int] = (0, 0)  # (epoch, step) that comes next
    window: Any = None  # sum of the losses of a window's steps, with their graphs
    steps: int = 0  # of the window
    loss: float = 0.0  # sum over tokens, in evaluation
    tokens: int = 0

    def within_window(self, loss: torch.Tensor) -> torch.Tensor:
        """loss as it is, with the gradients of all losses of its window."""
        self.window, self.steps = loss if self.window is None else self.window + loss, self.steps + 1
        return loss.detach() + (self.window - self.window.detach())

    def cut(self):
        """Ends a window: no later gradient reaches back before this."""
        self.window, self.steps = None, 0
        if self.cache is not None:
            self.cache = self.cache.detach()


class _LaneLoader(DataLoader):
    """Batches of an epoch of lanes, in order. Its length is the same every epoch."""

    def __init__(self, lanes: DocumentLanes, args: Any):
        self.steps = _Steps(len(lanes))
        super().__init__(
            _LaneBatches(lanes),
            batch_sampler=self.steps,
            collate_fn=_only,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            # Of its own, or each epoch and each evaluation would draw from the generator that dropout uses.
            generator=torch.Generator(),
        )

    def set_epoch(self, epoch: int):
        """Called by Trainer before each epoch."""
        self.steps.epoch = epoch


class _Steps(Sampler):
    """[(epoch, step)] for each step. The epoch travels in the index, since workers hold copies of the dataset."""

    def __init__(self, steps: int):
        self.steps = steps
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        for step in range(self.steps):
            yield [(self.epoch, step)]

    def set_epoch(self, epoch: int):
        """Called by Trainer where it resumes, on what it finds in a loader that skips batches."""
        self.epoch = epoch


class _LaneBatches(Dataset):
    """Whole batches by (epoch, step). Its length is what Trainer counts as samples: segments of all lanes."""

    def __init__(self, lanes: DocumentLanes):
        self.lanes = lanes

    def __len__(self) -> int:
        return len(self.lanes) * self.lanes.lanes * self.lanes.world_size

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Any]:
        batch = self.lanes.batch(*position)
        return {
            **batch,
            "labels": batch["shift_labels"],
            "position": position,
            "following": self.lanes.after(*position),
        }


def _only(batches: list[Any]) -> Any:
    (batch,) = batches
    return batch


def _comparable(config: Any) -> dict[str, Any]:
    """A model config as plain values, without what says nothing about weights and cache."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name not in VOLATILE}


def _is_byte_level(tokenizer: Any) -> bool:
    """Tells whether every token but the special ones is one byte: then bits per token are bits per byte."""
    if tokenizer is None or not hasattr(tokenizer, "all_special_ids"):
        return False
    sample = "aé€😀"  # 1 + 2 + 3 + 4 bytes in utf-8
    plain = len(tokenizer) - len(set(tokenizer.all_special_ids))
    return plain == 256 and len(tokenizer(sample, add_special_tokens=False)["input_ids"]) == len(sample.encode())
