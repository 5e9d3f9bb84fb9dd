"""The bare model of every variant: what enters a forward, what runs, what comes out.

    input_ids (B, columns) -> open_input: checked rows, cache, documents
                           -> parts: one batch of rows; where documents are packed, batches of documents
      each part            -> plan: Context -> embed (B, T, E), packed -> layers -> finish
                           -> unpack: the input's columns again; the cache takes the new state, last of all

A variant says how it embeds, what its layers share (`plan`) and what stands behind the last of them (`finish`).
Padding, packed documents, the cache and transformers' output classes are dealt with here, nowhere in a variant.
Letters: see spans.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from .block_rows import BlockRows
from .cache import CACHE_NAME, GalleryCache
from .context import ForwardContext
from .documents import PACKING, Documents
from .exporting import compile_whole, in_one_graph, readable, records_gradients, require
from .gradients import with_gradients_for
from .modeling_base import GalleryPreTrainedModel, check_arguments, check_tensors, is_static, no_cache
from .rows import Rows, unpack
from .states import NextState, State, follow, tensors_of
from .weights import version_of


@dataclass
class Part:
    """Rows that run through the layers together.

    past: what they go on with, a cache with a row for each, or None. keeps_state: their new state is the input's
    cache's.
    """

    rows: Rows
    past: GalleryCache | None
    keeps_state: bool


@dataclass
class LayerResults:
    """Output of the layers for a part: x (B, T, E), each layer's next state, and where asked for the hidden states
    before, between and behind the layers and the attentions, both over the input's columns."""

    x: torch.Tensor
    states: list[NextState]
    hidden: list[torch.Tensor] | None
    attentions: list | None


class Backbone(GalleryPreTrainedModel):
    """Layers under embeddings. `__init__` of a variant makes embed_tokens and layers."""

    _auto_class: Any = "AutoModel"  # transformers annotates its default, None
    output_type: type = BaseModelOutputWithPast
    gradient_checkpointing = False
    embed_tokens: nn.Module
    layers: nn.ModuleList
    causal = True  # a query sees nothing after it; an encoder keeps no cache
    embeds_positions = False  # else position_ids must say where the tokens stand anyway
    prefix = ""  # of its arguments' names, in messages
    own_arguments: tuple[str, ...] = ()  # of forward, besides what every variant takes
    exit_after: int | None = None  # layers that run, while the first of them draft a text (early_exit.py); None = all

    # ---- what a variant says

    def check(self, rows: Rows, cache: GalleryCache | None, longest: int, **inputs):
        """Raises ValueError unless the variant's own inputs fit. longest: tokens that the longest document reaches."""

    def embed(self, rows: Rows, input_ids, inputs_embeds, **more) -> torch.Tensor:
        """Packed embeddings (B, T, E)."""
        return self.embed_tokens(rows.pack(input_ids)) if inputs_embeds is None else rows.pack(inputs_embeds)

    def plan(self, common: ForwardContext, past: GalleryCache | None, **inputs) -> ForwardContext:
        """The variant's Context: `common`, the fields that all have, widened by its own. past: what the rows go on
        with."""
        raise NotImplementedError

    def tables_follow(self) -> list[nn.Module | nn.Parameter]:
        """The modules and weights that decide what a cache keeps besides the past: tables, and `Derived` state."""
        return []

    def layer_inputs(self, context: ForwardContext) -> tuple:
        """Further arguments of layers, after (hidden states, context, state): tensors that gradients must reach."""
        return ()

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """Applies what stands behind the last layer, (B, T, E)."""
        return x

    def results(self, context: ForwardContext, attentions: list | None) -> dict[str, Any]:
        """Further fields of the output, of an input whose documents are not packed."""
        return {"attentions": None if attentions is None else tuple(attentions)}

    # ---- the forward

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: torch.LongTensor | None = None,
        **inputs,
    ):
        """input_ids (B, T), or inputs_embeds (B, T, E) as get_input_embeddings() returns them; any T. attention_mask
        (B, T) or (B, columns seen + T): 1 at tokens, 0 at padding, which may stand anywhere and gets zeros.
        past_key_values: a GalleryCache, advanced in place.

        Documents may be packed one behind another in a row: position_ids (B, T) that start again at 0, cu_seq_lens_q
        and cu_seq_lens_k (documents + 1,), or seq_idx (B, T) say where each begins. Each gives what it gives alone;
        the first of a row goes on from the row's past if its positions do, and the cache keeps a row's last one.

        Raises ValueError for input that does not fit, TypeError for an argument that there is not, before anything is
        computed; the cache is then unchanged.
        """
        if not self.causal:
            no_cache(past_key_values)
            use_cache = False
        check_arguments(self, inputs, self.arguments())
        check_tensors(inputs)
        given = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
            **inputs,
        )
        if torch.compiler.is_compiling() and self.fits_one_graph(**given):
            return compile_whole(lambda: self._run(**given))
        return self._run(**given)

    def fits_one_graph(self, past_key_values, use_cache, position_ids, **inputs) -> bool:
        """Tells whether torch.compile may follow a forward as one graph: what a growing cache holds, where documents
        begin and which tokens are global decides how much there is to do, so it is asked."""
        if is_static(past_key_values) and past_key_values.is_initialized:
            return position_ids is None and all(inputs.get(name) is None for name in PACKING)
        caches = self.config.use_cache and not self.training if use_cache is None else use_cache
        asks = [position_ids, past_key_values, *(inputs.get(name) for name in (*PACKING, "global_attention_mask"))]
        return not caches and all(x is None for x in asks) and self.config._attn_implementation != "sdpa"

    def _run(
        self,
        *,
        input_ids,
        attention_mask,
        past_key_values,
        inputs_embeds,
        use_cache,
        output_attentions,
        output_hidden_states,
        position_ids,
        **inputs,
    ):
        if "token_type_ids" not in self.own_arguments:
            no_types(inputs.pop("token_type_ids", None))
        packing = {name: inputs.pop(name, None) for name in PACKING} | {"position_ids": position_ids}
        rows, cache, documents = self.open_input(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cache_position=inputs.pop("cache_position", None),
            packing=packing,
        )
        if documents is not None:
            longest = documents.longest
        else:
            longest = rows.longest
        inputs |= {"position_ids": position_ids}
        self.check(rows, cache, longest, **inputs)
        attends = self.config.output_attentions if output_attentions is None else output_attentions
        shows = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if documents is not None:
            self.check_packed(attends, inputs)
        if attends and rows.steps:
            raise ValueError(
                "output_attentions is True, and past_key_values is a GalleryStaticCache, whose columns do not stand "
                "in the order of time; leave one of them out"
            )
        parts = self.parts(rows, None if cache is None else cache.past_of(rows), documents)
        done, writes = [], None
        no_grad = not records_gradients()
        if cache is not None and not cache.detaches and not no_grad and self.has_reentrant_checkpoints():
            raise ValueError(
                "use_reentrant is True and past_key_values was made with detach=False: reentrant checkpoints cut the "
                "gradients that the cache carries; enable gradient checkpointing with use_reentrant=False"
            )
        asks = cache is not None and no_grad and not in_one_graph()
        version = version_of(self.tables_follow()) if asks else None
        for part in parts:
            common = ForwardContext(
                rows=part.rows,
                device=(input_ids if inputs_embeds is None else inputs_embeds).device,
                cached=0 if part.past is None else part.past.columns_held,
                keeps_state=part.keeps_state,
                max_columns=cache.max_columns if part.keeps_state else None,
                records=part.keeps_state and cache.recording,
                no_grad=no_grad,
                carries=part.past is not None and not cache.detaches and not no_grad,
                output_attentions=bool(attends),
                output_hidden_states=bool(shows),
                packed=documents is not None,
                implementation=self.config._attn_implementation,
                tables=None if part.past is None else part.past.read_tables(version),
            )
            context = self.plan(common, part.past, **inputs)
            x = self.embed(part.rows, input_ids, inputs_embeds, **inputs)
            if inputs_embeds is not None:
                x = with_gradients_for(x, self.embed_tokens)
            states = part.past.read_states(version) if part.past is not None else []
            states = states or [{}] * len(self.layers[: self.exit_after])
            result = self.run_layers(x, context, states, *self.layer_inputs(context))
            result.x = self.finish(result.x)
            if result.hidden is not None:
                result.hidden[-1] = result.x
            if part.keeps_state:
                writes = (result.states, part.rows, context.facts, context.tables, version, self)
            done.append((context, result))
        placed = [part.rows for part in parts]
        hidden = None
        if shows:
            hidden = tuple(zip(*(result.hidden for _, result in done), strict=True))  # for each layer, of all parts
            if documents is None:  # in the input's columns already, all but the last
                hidden = *(x for (x,) in hidden[:-1]), unpack(placed, hidden[-1])
            else:
                hidden = tuple(unpack(placed, xs) for xs in hidden)
        output = self.output_type(
            last_hidden_state=unpack(placed, [result.x for _, result in done]),
            **{CACHE_NAME: cache},
            hidden_states=hidden,
            **(self.results(done[0][0], done[0][1].attentions) if documents is None else {}),
        )
        if cache is not None:
            cache.write(*writes)
        return output

    @classmethod
    def arguments(cls) -> set[str]:
        """The names of all that forward takes by **inputs."""
        return {*PACKING, *cls.own_arguments, "cache_position", "token_type_ids"}

    def check_packed(self, attends: bool, inputs: dict):
        """Raises ValueError for what has no meaning where documents are packed."""
        if attends:
            raise ValueError(
                "output_attentions is True, and documents are packed in the rows: each has a map of its own, of its "
                "own size; leave output_attentions out, or give each document a row"
            )

    def parts(self, rows: Rows, cache: GalleryCache | None, documents: Documents | None) -> list[Part]:
        """The rows that run through the layers together: those of the input, or where documents are packed a row for
        each, in batches of like length. With a cache each row's last document runs among the input's rows."""
        if documents is None:
            return [Part(rows, cache, cache is not None)]
        together = is_sharded(self)  # all ranks must call the layers equally often
        if cache is None:
            return [Part(documents.rows(some), None, False) for some in documents.alike(documents.seen == 0, together)]
        parts = []
        for some in documents.alike(~documents.is_last & (documents.seen > 0), together):
            past = cache.copy()
            past.batch_select_indices(documents.row[some])
            parts.append(Part(documents.rows(some), past, False))
        for some in documents.alike(~documents.is_last & (documents.seen == 0), together):
            parts.append(Part(documents.rows(some), None, False))
        last, past = documents.last_rows(), cache
        if bool((last.fresh & (rows.seen > 0)).any()):
            past = cache.copy()
            past.reset_rows(last.fresh)
        return [*parts, Part(last, past, True)]

    def has_reentrant_checkpoints(self) -> bool:
        """Tells whether reentrant checkpoints compute layers again, which give no gradient to a layer's state."""
        checkpoints = (layer._gradient_checkpointing_func for layer in self.layers if layer.gradient_checkpointing)
        return self.training and any(checkpoint.keywords.get("use_reentrant") for checkpoint in checkpoints)

    def run_layers(self, x: torch.Tensor, context: ForwardContext, states: list[State], *more) -> LayerResults:
        """Runs the layers on x (B, T, E), each with its state and with `more` besides. Nothing is written."""
        hidden: list | None = [] if context.output_hidden_states else None
        x = shown(x, hidden, context)
        attentions: list | None = [] if context.output_attentions else None
        new = []
        for layer, state in zip(self.layers[: self.exit_after], states, strict=True):
            # Side by side: reentrant checkpoints give gradients to the tensors that a layer returns, and not to what
            # lies in a tuple of them.
            x, next_state, *probabilities = layer(x, context, state, *more)
            new.append(next_state)
            x = shown(x, hidden, context)
            if attentions is not None:
                attentions.append(probabilities[0] if len(probabilities) == 1 else tuple(probabilities))
        return LayerResults(x, new, hidden, attentions)

    def agreed(self, device: torch.device, calls: int) -> int:
        """The number of times to call each layer. This rank needs `calls`; where weights are gathered at each call it
        is the most that a rank needs, or ranks would wait for each other for ever."""
        if in_one_graph() or not is_sharded(self) or not torch.distributed.is_initialized():
            return calls
        most = torch.tensor(calls, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def run_in_blocks(
        self,
        x: torch.Tensor,
        context: ForwardContext,
        states: list[State],
        length: int,
        enter: Callable[[Any, list[State]], ForwardContext],
    ) -> LayerResults:
        """As run_layers, but each row's blocks of `length` tokens go through all layers one after the other: for what
        a layer gets from the block before of a layer above it.

        enter: makes a block's Context, of one without what crosses blocks and the states that the block before left.
        """
        cut = BlockRows(context.rows, length, partial(self.agreed, x.device))
        results: list[LayerResults] = []
        for part, rows in cut.split(x):
            own = replace(
                context,
                rows=rows,
                cached=0,  # and maps: of the whole text
                output_attentions=False,
                keeps_state=True,
                max_columns=None if context.records else self.config.cache_capacity,
                packed=True,  # hidden states are joined below
                memo={},
            )
            result = Backbone.run_layers(self, part, enter(own, states), states)
            if results:
                result.states = [follow(*x) for x in zip(result.states, results[-1].states, strict=True)]
            states = [tensors_of(state) for state in result.states]
            results.append(result)
        hidden = None
        if context.output_hidden_states:
            hidden = [cut.join(parts) for parts in zip(*(result.hidden or [] for result in results), strict=True)]
            hidden = hidden if context.packed else [context.rows.unpack(x) for x in hidden]
        return LayerResults(cut.join([result.x for result in results]), results[-1].states, hidden, None)


def shown(x: torch.Tensor, hidden: list | None, context: ForwardContext) -> torch.Tensor:
    """Adds a hidden state x (B, T, E) to those that are shown, if any are, and returns what the next layer reads.

    That is made from what is shown, the same in the input's columns, so that a gradient can be retained on it. Packed
    documents' hidden states are joined when all parts are done.
    """
    if hidden is None:
        return x
    hidden.append(x if context.packed else context.rows.unpack(x))
    return x if context.packed else context.rows.pack(hidden[-1])


def is_sharded(model: Backbone) -> bool:
    """Tells whether calls of the layers gather weights from other ranks, by ZeRO-3, FSDP or fully_shard."""
    names = {kind.__name__ for module in (model, *model.layers) for kind in type(module).__mro__}
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model) or "FSDPModule" in names


def no_types(token_type_ids: torch.Tensor | None):
    """Raises ValueError if token types that say something are given to a model without any; tokenizers give zeros
    unasked."""
    if token_type_ids is None:
        return
    if not readable(token_type_ids):
        require(token_type_ids == 0, "token_type_ids hold more than zeros, but this model has no token types")
    elif bool(token_type_ids.any()):
        raise ValueError("token_type_ids hold more than zeros, but this model has no token types; leave them out")
