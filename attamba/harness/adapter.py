"""A decoder with its own tokenizer, as the harness asks for a language model.

A document begins with the separator, as in training. Shapes: B rows of a batch, T tokens of the
longest, n scored tokens of all rows, d model width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from attamba.config import ConfigError, parse_overrides
from attamba.data import Tokenizer
from attamba.evaluate import LOGITS, filling
from attamba.generation import stream
from attamba.models import Decoder
from attamba.train.checkpoint import load, read_config
from attamba.train.storage import find_checkpoint

logger = logging.getLogger(__name__)

DEFAULT_DEVICE = "cuda:0"
"""What the harness's command line asks for where nobody gave --device."""

Score = tuple[float, bool]
"""Log-probability of a text, and whether it is what greedy decoding would say."""


class _Row(NamedTuple):
    """Inputs of one forward pass with the token after them; the last `scored` tokens count."""

    ids: list[int]
    scored: int


@register_model("attamba")
class AttambaLM(TemplateLM):
    """A decoder of any mixer.

    Args:
        model: its mode is restored after each request.
        tokenizer: the one that the model was trained with.
        context: inputs of a forward pass. A longer text is read in windows that do not overlap,
            the last one moved back until it is full; of a longer prompt the end is read.
        batch_size: rows of a forward pass. Rows of unequal lengths go together.

    Raises ValueError for context or batch_size below 1 or no whole number, and for a vocabulary
    that does not fit.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, *, context: int, batch_size: int = 8
    ) -> None:
        super().__init__()
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model knows "
                f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
            )
        self.model, self.text = model, tokenizer
        self.context = _at_least_one("context", context)
        self.batch_size = _at_least_one("batch_size", batch_size)
        self._device = model.embed.weight.device

    @classmethod
    def from_checkpoint(
        cls,
        pretrained: str | Path | None = None,
        *,
        context: int | None = None,
        batch_size: int = 8,
        device: str = "auto",
        dtype: str | None = None,
        **overrides: Any,
    ) -> AttambaLM:
        """What the harness's command line makes of --model_args.

        Args:
            pretrained: a run folder or a checkpoint folder.
            context: default: the run's data.seq_len.
            batch_size, device: the harness's --batch_size and --device.
            dtype: as attamba.load.
            overrides: config keys to change at test time: mixer.chunk_size=4.
        """
        if pretrained is None:
            raise ConfigError("there is no model: give --model_args pretrained=RUN_FOLDER")
        folder = find_checkpoint(pretrained)
        changed = parse_overrides([f"{key}={value}" for key, value in overrides.items()])
        model, tokenizer = load(folder, overrides=changed or None, device=device, dtype=dtype)
        context = read_config(folder).data.seq_len if context is None else context
        return cls(model, tokenizer, context=context, batch_size=batch_size)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> AttambaLM:
        """The harness's way to make a model of --model_args and its other options."""
        others = {k: v for k, v in (additional_config or {}).items() if v is not None}
        if others.get("device") == DEFAULT_DEVICE and not torch.cuda.is_available():
            logger.warning(
                "there is no %s, the harness's default device: using cpu", DEFAULT_DEVICE
            )
            others["device"] = "cpu"
        return cls.from_checkpoint(**{**arg_dict, **others})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> AttambaLM:
        """As create_from_arg_obj, of "pretrained=runs/first,context=512"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The separator, which is also what stands before a text without a prompt."""
        return self.text.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, the separator before them unless add_special_tokens is False."""
        ids = self.text.encode(string)
        return ids if add_special_tokens is False else [self.text.eos_id, *ids]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes beside its results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.embed.weight.dtype),
            "context": self.context,
        }

    # ------------------------------------------------------------------------------------
    # Likelihoods
    # ------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[Score]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        cut = sum(len(c) + len(t) > self.context + 1 for _, c, t in requests)
        if cut:
            logger.warning(
                "%d of %d requests are longer than context=%d: of their prompts the end is read",
                *(cut, len(requests), self.context),
            )
        scores = self._score(rows, disable_tqdm)
        for (key, _, _), score in zip(requests, scores):
            self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def _row(self, context: list[int], continuation: list[int]) -> _Row:
        if len(continuation) > self.context:
            raise ValueError(
                f"context={self.context} is shorter than an answer of {len(continuation)} tokens; "
                f"give a context of at least {len(continuation)}"
            )
        return _Row([*context, *continuation][-self.context - 1 :], len(continuation))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, every token once."""
        rows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.text.eos_id, self.context, 1)
            for inputs, predicted in windows:
                rows.append(_Row([*inputs, predicted[-1]], len(predicted)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_p, _) in zip(owners, self._score(rows, disable_tqdm)):
            totals[number] += log_p
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.inference_mode()
    def _score(self, rows: Sequence[_Row], disable_tqdm: bool) -> list[Score]:
        """Scores of rows, in their order; rows of like lengths go through the model together."""
        scores: list[Score] = [(0.0, True)] * len(rows)
        with _eval_mode(self.model), tqdm(total=len(rows), disable=disable_tqdm or None) as bar:
            for batch in self._batches([len(row.ids) for row in rows]):
                for i, score in zip(batch, self._forward([rows[i] for i in batch])):
                    scores[i] = score
                bar.update(len(batch))
        return scores

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices, the longest first: what does not fit into memory shows at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for begin in range(0, len(order), self.batch_size):
            yield order[begin : begin + self.batch_size]

    def _forward(self, rows: list[_Row]) -> list[Score]:
        """Score B rows. Shorter ones are filled up at the right, where nothing looks."""
        longest = max(len(row.ids) for row in rows) - 1
        inputs = torch.zeros(len(rows), longest, dtype=torch.long)
        targets = torch.zeros_like(inputs)
        keep = torch.zeros_like(inputs, dtype=torch.bool)
        for i, (ids, scored) in enumerate(rows):
            n = len(ids) - 1
            inputs[i, :n] = torch.tensor(ids[:-1])
            targets[i, :n] = torch.tensor(ids[1:])
            keep[i, n - scored : n] = True
        doc_ids = filling(self.model, [len(row.ids) - 1 for row in rows], longest)
        hidden = self.model(inputs.to(self._device), doc_ids=doc_ids, return_hidden=True)
        hidden = hidden[keep.to(self._device)]
        log_p, greedy = self._log_p(hidden, targets[keep].to(self._device))
        counts = [row.scored for row in rows]
        return [
            (float(p.sum()), bool(g.all()))
            for p, g in zip(log_p.split(counts), greedy.split(counts))
        ]

    def _log_p(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p [n] of targets [n] after hidden states [n, d], float64, and whether it is the
        largest; both on the CPU."""
        # Few logits at a time: those of all tokens would outweigh the model.
        rows = max(1, LOGITS // self.model.config.vocab_size)
        log_p, greedy = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows)):
            logits = self.model.head(h).float()
            log_p.append(-F.cross_entropy(logits, t, reduction="none").double())
            greedy.append(logits.argmax(-1) == t)
        return torch.cat(log_p).cpu(), torch.cat(greedy).cpu()

    # ------------------------------------------------------------------------------------
    # Text
    # ------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt up to one of its stop strings."""
        prompts = [self.tok_encode(request.args[0])[-self.context :] for request in requests]
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None) as bar:
            for members in groups.values():
                options = _options(requests[members[0]].args[1])
                for batch in self._batches([len(prompts[i]) for i in members]):
                    chosen = [members[i] for i in batch]
                    said = self._continue([prompts[i] for i in chosen], options)
                    for i, text in zip(chosen, said):
                        texts[i] = text
                    bar.update(len(chosen))
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _continue(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        texts = [""] * len(prompts)
        with closing(stream(self.model, prompts, tokenizer=self.text, **options)) as steps:
            for step in steps:
                texts = [text + new for text, new in zip(texts, step.text)]
        return texts


def _options(wanted: dict[str, Any]) -> dict[str, Any]:
    """The harness's generation options as `stream` takes them.

    Raises ValueError for one that there is not.
    """
    given: dict[str, Any] = dict(normalize_gen_kwargs(wanted))
    options = {
        "max_new_tokens": given.pop("max_gen_toks"),
        "stop": [text for text in given.pop("until") if text] or None,
        "temperature": given.pop("temperature", 0.0) if given.pop("do_sample") else 0.0,
        "top_k": given.pop("top_k", None),
        "top_p": given.pop("top_p", None),
    }
    given.pop("temperature", None)
    if given:
        raise ValueError(
            f"generation options {given} are not known; there are: max_gen_toks, until, do_sample, "
            f"temperature, top_k, top_p"
        )
    return options


@contextmanager
def _eval_mode(model: Decoder) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _at_least_one(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value} must be a whole number of at least 1")
    return int(value)
