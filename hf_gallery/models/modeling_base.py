"""Base of all gallery models: checks their input, keeps their cache, saves them with their code."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import sys
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin

from .attention_problem import autocasts
from .cache import CACHE_NAME, GalleryCache
from .documents import Documents, find_documents
from .early_exit import EarlyExit
from .exporting import in_one_graph, is_exporting, outside_graphs, readable, require
from .loading import check_weights
from .rows import Rows
from .static_cache import GalleryStaticCache


class GalleryPreTrainedModel(PreTrainedModel):
    """Base of every gallery model.

    `auto_classes` of a variant maps the Auto classes to its class names: all of them go into a saved folder's
    auto_map, so that one checkpoint opens under every head.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    auto_classes: dict[str, str] = {}
    takes_pairs = False  # what a layer keeps of a token is its key and value, so that a prefix may be made of them
    implementations = {"eager": "its own attention"}  # names of attn_implementation, with what each is
    embeds_positions = True  # whether position_ids may be anything; a backbone may know distances only
    prefix = ""  # of the input's names, in messages
    head_loss: str | None = None  # which of transformers' losses; it would go by the class name, also of a subclass

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._supports_sdpa = "sdpa" in cls.implementations
        cls._supports_flex_attn = "flex_attention" in cls.implementations

    def __init__(self, config, *inputs, **kwargs):
        config.check_special_ids()  # again: fields may have been set since, from_pretrained(vocab_size=...) does so
        super().__init__(config, *inputs, **kwargs)
        self.loss_type = self.head_loss or self.loss_type

    def _init_weights(self, module: nn.Module):
        init_linear(module, self.config.initializer_range)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        requested = requested_attention or "eager"
        if requested not in self.implementations:
            known = "; ".join(f"{name!r}: {what}" for name, what in self.implementations.items())
            raise ValueError(
                f'Specified `attn_implementation="{requested}"` is not supported. {type(self).__name__} has {known}'
            )
        return requested

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *arguments, **options) -> str:
        # For transformers a name with "flash" in it is a package of kernels, which it would import.
        if attn_implementation in self.implementations:
            return attn_implementation
        return super()._check_and_adjust_attn_implementation(attn_implementation, *arguments, **options)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ):
        """As in transformers. Raises ValueError if a special id would fall out of the vocabulary: the model would save
        and not load again."""
        self._check_special_ids(self.new_size(new_num_tokens, pad_to_multiple_of))
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def new_size(self, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> int:
        """The size that the arguments of resize_token_embeddings ask for. Raises ValueError unless they are
        whole numbers of at least 1."""
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1, or None")
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        return size if pad_to_multiple_of is None else -(-size // pad_to_multiple_of) * pad_to_multiple_of

    def _check_special_ids(self, size: int):
        for owner in ("config", "generation_config"):
            settings = getattr(self, owner, None)
            for name, value in () if settings is None else settings.to_dict().items():
                ids = value if isinstance(value, (list, tuple)) else [value]
                if name.endswith("_token_id") and any(isinstance(x, int) and x >= size for x in ids):
                    raise ValueError(
                        f"the new vocabulary has {size} tokens and {owner}.{name} is {value}; set it to an id below "
                        f"{size} or to None first"
                    )

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for its own registry in the source; ours is `attend`

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; the folder also gets the code, and opens with trust_remote_code under every head."""
        self.name_classes()
        return super().save_pretrained(save_directory, **kwargs)

    def name_classes(self):
        """Writes into the config which class of which file of code each Auto class opens."""
        module = sys.modules[type(self).__module__].__name__.split(".")[-1]
        config_module = type(self.config).__module__.split(".")[-1]
        # transformers' server and its decision pipeline take any causal model, but find one in a folder's code by this
        # name only.
        classes = dict(self.auto_classes)
        if "AutoModelForCausalLM" in classes:
            classes["AutoModelForDecision"] = classes["AutoModelForCausalLM"]
        self.config.auto_map = {"AutoConfig": f"{config_module}.{type(self.config).__name__}"} | {
            auto: f"{module}.{name}" for auto, name in classes.items()
        }

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """A step of from_pretrained, between the model on the meta device and memory for its weights."""
        if not getattr(load_config, "is_quantized", False):
            may_differ = getattr(load_config, "ignore_mismatched_sizes", False)
            check_weights(model, state_dict, checkpoint_files, may_differ)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def __call__(self, *args, **kwargs):
        """A forward. The cache that is given, as past_key_values or as cache, advances when all of it, head and loss
        too, has succeeded."""
        name_cache(kwargs, "past_key_values")
        kwargs.pop("skip_logits", None)  # a leave, which Trainer gives under use_liger_kernel: they are there anyway
        cache = next((x for x in (*args, *kwargs.values()) if hasattr(x, "held")), None)
        whole = torch.compiler.is_compiling() and is_static(cache)  # a graph writes last of all anyway
        with nullcontext() if cache is None or whole else cache.held():
            return super().__call__(*args, **kwargs)

    # ---- input

    @outside_graphs  # it asks what the input holds, which no compiled graph can
    def open_input(
        self,
        *,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values=None,
        use_cache: bool | None = False,
        cache_position: torch.Tensor | None = None,
        packing: dict | None = None,
    ) -> tuple[Rows, GalleryCache | None, Documents | None]:
        """Checks the input of a forward, before anything is computed or changed.

        packing: what tells where documents begin, by name; see find_documents. Returns the rows, the cache to advance
        (None if none is wanted) and the documents, None where each row goes on from its past with one.
        """
        ids_name, embeds_name, mask_name = (self.prefix + x for x in ("input_ids", "inputs_embeds", "attention_mask"))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"give exactly one of {ids_name} and {embeds_name}")
        x = input_ids if inputs_embeds is None else inputs_embeds
        wanted = 2 if inputs_embeds is None else 3
        name = ids_name if inputs_embeds is None else embeds_name
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; give a tensor, torch.as_tensor({name})")
        if x.dim() != wanted or 0 in x.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be "
                f"(batch, tokens{', hidden_size' if wanted == 3 else ''}) with at least one row and one token"
            )
        if wanted == 3 and x.shape[2] != self.config.embedding_width:
            field = "hidden_size" if getattr(self.config, "embedding_size", None) is None else "embedding_size"
            raise ValueError(f"{name} is {x.shape[2]} wide; this model's {field} is {self.config.embedding_width}")
        if wanted == 3 and x.dtype != self.dtype and not autocasts(x.device.type):
            raise ValueError(f"{name} has type {x.dtype}, the model {self.dtype}; give {name}.to(model.dtype)")
        b, t = x.shape[:2]
        if is_exporting():
            if self.training:
                raise ValueError(
                    "the model is in training under torch.export, and what is exported infers, without dropout; call "
                    "model.eval() first"
                )
            cached = is_static(past_key_values)
            given = {} if cached else {"past_key_values": past_key_values, "use_cache": use_cache or None}
            refuse_export(name for name, value in (given | (packing or {})).items() if value is not None)
            use_cache = cached
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        cache = self.as_own_cache(past_key_values)
        if cache is not None:
            cache.check(self.config, b)
            cache.check_weights(self)
        elif use_cache:
            cache = GalleryCache(self.config)
        check_tensors(packing or {})
        mask = self.check_mask(attention_mask, b, t, cache, mask_name)
        given = {name: x for name, x in (packing or {}).items() if x is not None}
        if cache is None:
            rows = Rows(b, t, mask.cpu() if mask is not None and given else mask, None)  # documents are found there
        else:
            rows = cache.rows_of(b, t, mask, bool(given))
        if input_ids is not None:
            self.check_ids(ids_name, rows.pack(input_ids))
        if cache_position is not None:
            past = 0 if cache is None else cache.columns
            if cache_position.tolist() != list(range(past, past + t)):
                raise ValueError(
                    f"cache_position is not {past} to {past + t - 1}, the columns that come after those seen; leave "
                    "it out"
                )
        documents = find_documents(rows, counted=not self.embeds_positions, **given) if given else None
        return rows, cache, documents

    def as_own_cache(self, past) -> GalleryCache | None:
        """past_key_values as this model keeps it: a DynamicCache of PEFT's prefix tuning holds the keys and values of
        tokens that are read first. Raises ValueError for what cannot be taken."""
        if past is None or isinstance(past, GalleryCache) or type(past).__name__ == "GalleryCache" or is_static(past):
            return past
        if not isinstance(past, DynamicCache) or not past.get_seq_length():
            raise ValueError(
                f"past_key_values is a {type(past).__name__}; give a GalleryCache, or None to start with one"
            )
        if not self.takes_pairs or self.config.is_encoder_decoder:
            raise ValueError(
                f"past_key_values is a {type(past).__name__}, as prefix tuning gives it; {type(self).__name__} keeps "
                "more of a token than its key and value: use prompt tuning, or give a GalleryCache"
            )
        return GalleryCache.from_pairs(self.config, [(layer.keys, layer.values) for layer in past.layers])

    def check_ids(self, name: str, ids: torch.Tensor):
        """Raises ValueError if an id is outside the vocabulary: a GPU would only say that an assertion failed."""
        if ids.dtype not in (torch.long, torch.int):
            raise ValueError(f"{name} has type {ids.dtype}; token ids must be torch.long or torch.int")
        if not readable(ids):
            size = self.config.vocab_size
            wanted = f"ids must be in [0, {size}). Is the tokenizer this model's?"
            require((ids >= 0) & (ids < size), f"{name} holds ids outside the vocabulary; {wanted}", ids)
            return
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"{name} holds the id {low if low < 0 else high}, outside the vocabulary of vocab_size "
                f"{self.config.vocab_size}; ids must be in [0, {self.config.vocab_size}). Is the tokenizer this "
                "model's?"
            )

    @staticmethod
    def check_mask(mask, b: int, t: int, cache, name: str = "attention_mask") -> torch.Tensor | None:
        """The mask of the new columns, (B, T) of booleans; None where all are tokens."""
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"{name} is a {type(mask).__name__}; give a tensor, torch.as_tensor({name})")
        past = 0 if cache is None or mask.shape[-1] == t or in_one_graph() else cache.columns
        if mask.dim() != 2 or mask.shape[0] != b or mask.shape[1] not in (t, past + t):
            also = f" or ({b}, {past + t})" if past else ""
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}; {b} rows of {t} new tokens need ({b}, {t}){also}, "
                "1 at tokens and 0 at padding"
            )
        mask = mask[:, -t:]
        if mask.dtype != torch.bool:
            check_marks(name, mask, "tokens", "padding")
            mask = mask != 0
        return mask


def refuse_export(names: Iterable[str]):
    """Raises ValueError if an argument is given that torch.export cannot follow."""
    for name in names:
        raise ValueError(
            f"{name} is given under torch.export; what is exported infers, from whole texts, one to a row: leave it "
            "out"
        )


class GalleryGenerationMixin(GenerationMixin):
    """generate() with a GalleryCache in place of transformers' own."""

    @classmethod
    def can_generate(cls) -> bool:
        return True  # transformers looks for GenerationMixin among the direct bases only

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        name_cache(kwargs, CACHE_NAME)
        result = super().generate(*args, **kwargs)
        settings = args[1] if len(args) > 1 else kwargs.get("generation_config")
        if getattr(settings, "is_assistant", False):
            return result  # whoever is assisted takes tokens back between the calls
        for cache in (kwargs.get(CACHE_NAME), getattr(result, CACHE_NAME, None)):
            if hasattr(cache, "deactivate_past_recording"):
                cache.deactivate_past_recording()
        return result

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        cache, embeds = kwargs.get(CACHE_NAME), kwargs.get("inputs_embeds")
        if kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length", 0) is None and embeds is None:
            # Assisted decoding would read a text again that a given cache has behind it.
            new = input_ids.shape[1] - (0 if cache is None else cache.get_seq_length())
            kwargs["next_sequence_length"] = new if new > 0 else None
        # By this name PEFT knows whether its virtual tokens have been read: without, it reads them before every token.
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        name_cache(inputs, "past_key_values")
        for name in ("tokenizer", "assistant_tokenizer", "assistant_model"):
            inputs.pop(name, None)  # generate's own, which it hands on to the model all the same
        return inputs

    def _get_candidate_generator(self, *, generation_config, **kwargs):
        if generation_config.assistant_early_exit is None:
            return super()._get_candidate_generator(generation_config=generation_config, **kwargs)
        names = ("input_ids", "inputs_tensor", "logits_processor", "model_kwargs")
        given = {name: kwargs[name] for name in names}
        return EarlyExit(generation_config=generation_config, assistant_model=self, **given)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """The mask (B, T) of the new columns, for a GalleryStaticCache: a mask of all would grow at each token."""
        if attention_mask is None:
            return None
        return attention_mask[:, -inputs_embeds.shape[1] :].clone(memory_format=torch.contiguous_format)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        return None  # rows count their own tokens

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
    ):
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation is {implementation!r}; gallery models carry their own GalleryCache, so leave "
                'it None, or give "static" for a GalleryStaticCache'
            )
        cache = model_kwargs.get(CACHE_NAME)
        if implementation == "static" and cache is not None:
            raise ValueError(
                f'cache_implementation is "static" and a {type(cache).__name__} is given; give one of them'
            )
        exit_at, most = generation_config.assistant_early_exit, self.config.cache_layers
        if exit_at is not None and (type(exit_at) is not int or not 1 <= exit_at <= most):
            raise ValueError(
                f"assistant_early_exit is {exit_at!r}; it counts the layers that draft a text, so give a whole number "
                f"from 1 to this model's {most}"
            )
        if cache is not None:
            cache._is_user_defined = True
        elif implementation == "static" and generation_config.use_cache is not False:
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs[CACHE_NAME] = GalleryStaticCache(self.config, length)
            if generation_config.is_assistant:
                model_kwargs[CACHE_NAME].activate_past_recording()
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = GalleryCache(self.config)
            if generation_config.is_assistant:
                model_kwargs[CACHE_NAME].activate_past_recording()


def is_static(past_key_values) -> bool:
    """Tells whether it is a GalleryStaticCache, of whatever copy of this code."""
    return type(past_key_values).__name__ == "GalleryStaticCache"


def no_cache(past_key_values):
    """Raises ValueError if an encoder is given a cache."""
    if past_key_values is not None:
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}, given to an encoder, which sees its whole input "
            "at once and keeps nothing; leave it out, or set is_decoder"
        )


def name_cache(kwargs: dict, name: str):
    """Calls the cache in kwargs `name`, by whichever of its two names it came. Raises ValueError if by both."""
    given = [key for key in ("past_key_values", "cache") if kwargs.get(key) is not None]
    if len(given) == 2:
        raise ValueError("past_key_values and cache are two names of one argument; give one of them")
    for key in ("past_key_values", "cache"):
        if key != name and key in kwargs:
            value = kwargs.pop(key)
            if value is not None:
                kwargs[name] = value


def check_tensors(given: dict):
    """Raises TypeError if one of these is a list or an array where a tensor belongs."""
    for name, x in given.items():
        if isinstance(x, (list, tuple)) or type(x).__module__ == "numpy":
            raise TypeError(f"{name} is a {type(x).__name__}; give a tensor, torch.as_tensor({name})")


def check_marks(name: str, mask: torch.Tensor, ones: str, zeros: str):
    """Raises ValueError unless the mask holds nothing but 1, at `ones`, and 0, at `zeros`."""
    sound, wanted = (mask == 0) | (mask == 1), f"it must hold 1 at {ones} and 0 at {zeros}"
    if not readable(sound):
        require(sound, f"{name} holds other values; {wanted}")
    elif not bool(sound.all()):
        raise ValueError(f"{name} holds values from {mask.min().item()} to {mask.max().item()}; {wanted}")


def check_arguments(model: nn.Module, given: dict, known: set[str]):
    """Raises TypeError if an argument is given that the model's forward does not take, beside those that it names."""
    unknown = [name for name, value in given.items() if name not in known and value is not None]
    if not unknown:
        return
    forwards = [vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind)]
    named = [x for forward in forwards for x in inspect.signature(forward).parameters.values()]
    names = {x.name for x in named if x.kind is x.POSITIONAL_OR_KEYWORD} - {"self", "input"} | known
    near = difflib.get_close_matches(unknown[0], sorted(names), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(names))}"
    raise TypeError(f"{type(model).__name__} takes no argument {unknown[0]!r}; {hint}")


def with_config(config, **changes):
    """The config itself if it already says so, else a copy that does."""
    if all(getattr(config, name) == value for name, value in changes.items()):
        return config
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def init_linear(module: nn.Module, std: float):
    """normal(0, std) for linear maps and embeddings, biases 0, norms at 1 and 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, 0.0, std)
    if getattr(module, "bias", None) is not None and isinstance(module.bias, nn.Parameter):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
