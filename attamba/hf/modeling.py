"""The decoder as a transformers model.

Parameters keep the decoder's names behind one prefix, "model.decoder.", so that a checkpoint goes
back and forth without a change. What a forward pass computes, and what it keeps, is the decoder's.

Shapes: B batch, T tokens of a call, S tokens with those in the cache, d model width, V vocabulary,
n layers, G key/value heads.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from attamba.config import Mixer
from attamba.hf.cache import AttambaCache
from attamba.hf.configuration import AttambaConfig
from attamba.hf.inputs import check_positions, packed_documents, padding
from attamba.models.decoder import Block, Decoder

logger = logging.get_logger(__name__)


class AttambaBlock(GradientCheckpointingLayer, Block):
    """The decoder's layer, which forgets its activations where gradient checkpointing is on."""


class AttambaPreTrainedModel(PreTrainedModel):
    """What both models share; `decoder` is the one Decoder behind either."""

    config_class = AttambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # a cache cannot go back, so that assisted decoding is refused
    # Layers share positions and a cache, which are on one device.
    _no_split_modules = ["Decoder"]  # noqa: RUF012 - the base class's own form
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": AttambaBlock}  # noqa: RUF012
    decoder: Decoder

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base class.

        Raises ValueError for weights that are missing, left over, damaged or of another shape, and
        for a device_map over several devices or a disk.
        """
        wanted = kwargs.pop("output_loading_info", False)
        tolerant = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"{name}: the weights are damaged ({error}); export the model again, or restore "
                f"the file"
            ) from error
        _check_weights(name, info, tolerant)
        devices = set(getattr(model, "hf_device_map", {}).values())
        if len(devices) > 1 or "disk" in devices:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"device_map puts the model on {names}, but its layers share positions and a cache "
                f"and read each other's weights, on one device and in memory; give one device that "
                f"it fits on, e.g. device_map='cuda:0' or 'cpu'"
            )
        return (model, info) if wanted else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The decoder's parts draw their own weights; a buffer that is not saved is set here."""
        if isinstance(module, Decoder):
            init.zeros_(module.draw)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.decoder.embed = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As the base class; the decoder is told of its new vocabulary."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.decoder.config = self.config.to_model_config()
        return embeddings


def _check_weights(name: Any, info: dict[str, Any], tolerant: bool) -> None:
    """Raise ValueError for what from_pretrained would only tell the log."""
    shapes = [] if tolerant else [key[0] for key in info["mismatched_keys"]]
    for keys, where in (
        (info["missing_keys"] - set(shapes), "are not in the checkpoint"),
        (info["unexpected_keys"], "are in the checkpoint, but not in the model"),
        (shapes, "have another shape in the checkpoint"),
    ):
        if keys:
            raise ValueError(
                f"{name}: {len(keys)} tensors {where} ({', '.join(sorted(keys)[:5])}); config.json "
                f"and weights are not of one model: export it again, or restore the files"
            )


class AttambaModel(AttambaPreTrainedModel):
    """Token ids to the last layer's hidden states.

    with_head: keep the decoder's head, for AttambaForCausalLM.
    """

    _keys_to_ignore_on_load_unexpected = [r"decoder\.head\."]  # noqa: RUF012

    def __init__(self, config: AttambaConfig, with_head: bool = False) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.to_model_config())
        for layer in self.decoder.layers:
            layer.__class__ = AttambaBlock  # the same layer, nothing of it is built anew
        if not with_head:
            del self.decoder.head
        self.random_ends = any(_is_random(mixer) for mixer in self.decoder.config.layer_mixers())
        self.post_init()

    def get_decoder(self) -> AttambaModel:
        return self

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: AttambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        doc_ids: Tensor | None = None,
        ends: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """last_hidden_state [B, T, d], after the final norm, and the cache.

        use_cache: return a cache. Default: config.use_cache outside training. The others: see
        AttambaForCausalLM.
        """
        if output_attentions:
            raise ValueError("output_attentions=True: attention weights are never formed")
        given = [tensor for tensor in (input_ids, inputs_embeds) if tensor is not None]
        if len(given) != 1:
            raise ValueError("pass either input_ids or inputs_embeds")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        batch, seq = given[0].shape[:2]
        if self._computes_anew():
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values with gradient checkpointing: what the backward pass computes "
                    "anew would be kept twice; leave the cache out, or checkpointing off"
                )
            if use_cache:
                logger.warning_once("use_cache=True has no effect with gradient checkpointing")
                use_cache = False
        cache = self._cache(past_key_values, use_cache, batch)
        mask = padding(attention_mask, seq, cached=cache is not None)
        if position_ids is not None:
            if cache is None and mask is None and doc_ids is None:
                doc_ids = packed_documents(position_ids.expand(batch, -1))
            else:
                check_positions(position_ids, mask, cache, doc_ids)
        if self.training and self.random_ends:
            # From torch's random state, which Trainer's checkpoints hold.
            self.decoder.draw.copy_(torch.randint(2**31, (), device="cpu"))
        hidden = self.decoder(
            input_ids,
            doc_ids=doc_ids,
            attention_mask=mask,
            ends=ends,
            cache=None if cache is None else cache.decode,
            inputs_embeds=inputs_embeds,
            return_hidden=True,
        )
        if cache is not None:
            cache.seen += seq
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _computes_anew(self) -> bool:
        """Will the backward pass of this call run layers once more?"""
        checkpointed = any(layer.gradient_checkpointing for layer in self.decoder.layers)
        return checkpointed and self.training and torch.is_grad_enabled()

    def _cache(self, given: Any, use_cache: bool, batch: int) -> AttambaCache | None:
        if given is None and not use_cache:
            return None
        cache = AttambaCache() if given is None else given
        if not isinstance(cache, AttambaCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; this architecture has a cache of "
                f"its own: pass an attamba.hf.AttambaCache, or leave it out"
            )
        if cache.decode is None:
            cache.decode = self.decoder.new_cache(batch)
        return cache


def _is_random(mixer: Mixer) -> bool:
    """Does a mixer's boundary policy draw chunk ends anew at each training step?"""
    return getattr(mixer, "policy", None) in ("jitter", "random")


class AttambaForCausalLM(AttambaPreTrainedModel, GenerationMixin):
    """A decoder of any mixer with its head, and transformers' generate()."""

    _tied_weights_keys = {  # noqa: RUF012
        "model.decoder.head.weight": "model.decoder.embed.weight"
    }

    def __init__(self, config: AttambaConfig) -> None:
        super().__init__(config)
        self.model = AttambaModel(config, with_head=True)
        self.post_init()

    @property
    def decoder(self) -> Decoder:  # type: ignore[override]
        """The decoder, which can be used without its wrapper."""
        return self.model.decoder

    def get_decoder(self) -> AttambaModel:
        return self.model

    @classmethod
    def from_decoder(cls, decoder: Decoder, **others: Any) -> AttambaForCausalLM:
        """A wrapper that shares the parameters of `decoder` and its mode.

        others: fields of AttambaConfig that ModelConfig has not (eos_token_id, ...).
        """
        config = AttambaConfig.from_model_config(decoder.config, **others)
        with torch.device("meta"):
            model = cls(config)
        for name, parameter in decoder.named_parameters():
            path, _, leaf = name.rpartition(".")
            setattr(model.decoder.get_submodule(path), leaf, parameter)
        model.decoder.draw = decoder.draw
        model.tie_weights()
        model.config.dtype = model.dtype
        return model.train(decoder.training)

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: AttambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        doc_ids: Tensor | None = None,
        ends: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every position.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S] or [B, T], 1 on tokens; the last T columns count. Padding
                stands on the left; without a cache also on the right, where it changes nothing.
            past_key_values: what was seen before, updated in place. Default: nothing.
            inputs_embeds: [B, T, d] instead of input_ids.
            labels: int64 [B, T], -100 where none; position t is scored on label t + 1.
            use_cache: return a cache. Default: config.use_cache outside training, if there are no
                labels.
            logits_to_keep: the last so many positions get logits, 0 for all; or their indices.
            doc_ids: int [B, T], packed documents, as the decoder takes them.
            ends: bool, for boundary "given", as the decoder takes them.
            kwargs: position_ids [B or 1, T] begin again at 0 where a packed document begins, and
                are else those that the model counts itself; num_items_in_batch is for the loss;
                output_hidden_states, return_dict as everywhere.

        Returns loss (with labels), logits [B, T or fewer, V], past_key_values, hidden_states.
        Raises ValueError for another model's cache, padding to the right with a cache, positions
        that are not the model's, and whatever the decoder refuses.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        cache = past_key_values
        with cache.mode() if isinstance(cache, AttambaCache) else nullcontext():
            outputs = self.model(
                input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                doc_ids=doc_ids,
                ends=ends,
                **kwargs,
            )
            hidden = outputs.last_hidden_state
            if not isinstance(logits_to_keep, int):
                hidden = hidden[:, logits_to_keep]
            elif logits_to_keep:
                hidden = hidden[:, -logits_to_keep:]
            logits = self.decoder.head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: AttambaCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        ends: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As the base class; of `ends`, which cover all tokens to come, a call gets its own.

        Raises ValueError where the cache has seen all that is given.
        """
        if next_sequence_length is not None and next_sequence_length <= 0:
            raise ValueError(
                f"past_key_values has seen {past_key_values.seen if past_key_values else 0} tokens "
                f"and input_ids has {input_ids.shape[1]}; give those that were seen and at least "
                f"one more"
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if ends is not None:
            embeds = inputs.get("inputs_embeds")
            seq = (inputs["input_ids"] if embeds is None else embeds).shape[1]
            begin = 0 if past_key_values is None else past_key_values.seen
            inputs["ends"] = ends[..., begin : begin + seq]
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """An empty AttambaCache where generate() is to use one and was given none."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} cannot hold chunks; leave it out: the model's own "
                f"cache is the small one already"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            given._is_user_defined = True  # generate() asks for it
        elif generation_config.use_cache:
            cache = model_kwargs["past_key_values"] = AttambaCache()
            # Weights that other ranks hold are gathered as inference tensors there, and stay so.
            weight = self.decoder.embed.weight
            alone = type(weight) is nn.Parameter and weight.numel() > 0
            seen = generation_config.return_dict_in_generate or torch.is_grad_enabled()
            cache.inference_only = alone and not seen
            if generation_config.is_assistant:
                cache.activate_past_recording()

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: continuous batching pages keys and values of its own."""
        raise ValueError(
            "generate_batch (cache_implementation='paged') needs a paged cache of every token, "
            "which this architecture does not keep; call generate with a left-padded batch"
        )
