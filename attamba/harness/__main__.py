"""`attamba-lm-eval`: the harness's own command line, which finds the model "attamba" here.

    attamba-lm-eval --model attamba --model_args pretrained=runs/first --tasks hellaswag
    attamba-lm-eval --model attamba --model_args pretrained=runs/first,mixer.chunk_size=4 \
        --tasks wikitext2_local --metadata wikitext2_local=wiki.test.raw

Every option is the harness's. Local tasks are known unless --include_path or --config names
others.

The harness (0.4.13) offers packages no way to name a model for its command `lm_eval`, so that this
command stands beside it. `lm_eval` itself takes an exported folder; for tasks that score whole
texts, such as wikitext, add_bos_token=False keeps it from scoring a second separator:

    attamba export runs/first exported --trust-remote-code
    lm_eval --model hf --model_args pretrained=exported,trust_remote_code=True --tasks hellaswag
"""

from __future__ import annotations

import sys


def main() -> None:
    """Register the model and the local tasks, then do what `lm_eval` does."""
    from lm_eval.__main__ import cli_evaluate

    from attamba.harness.run import TASKS

    own = ("--include_path", "--config", "-C")
    if len(sys.argv) > 2 and not any(word.partition("=")[0] in own for word in sys.argv):
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
