"""`attamba-lm-eval`: the harness's own command line, which finds the model "attamba" here.

    attamba-lm-eval --model attamba --model_args pretrained=runs/first --tasks hellaswag
    attamba-lm-eval --model attamba --model_args pretrained=runs/first,mixer.chunk_size=4 \
        --tasks wikitext2_local --metadata wikitext2_local=wiki.test.raw

Every option is the harness's. Local tasks are known unless --include_path or --config names
others.

`lm_eval` itself finds the model by the entry point "lm_eval.models", which the harness's releases
after 0.4.13 read (its docs/plugins.md). 0.4.13 has no such way; there it knows the model once it
has read one of our tasks, named by its file, or takes an exported folder. (For tasks that score
whole texts, such as wikitext, add_bos_token=False keeps that from scoring a second separator.)

    lm_eval --model attamba --model_args pretrained=runs/first \
        --tasks attamba/harness/tasks/books_bpb.yaml,hellaswag --metadata books_bpb=book.txt
    attamba export runs/first exported --trust-remote-code
    lm_eval --model hf --model_args pretrained=exported,trust_remote_code=True --tasks hellaswag
"""

from __future__ import annotations

import sys


def main() -> None:
    """Register the model and the local tasks, then do what `lm_eval` does.

    What this package has to say of the user's mistakes is one line; exit status 2.
    """
    from lm_eval.__main__ import cli_evaluate

    from attamba.config import ConfigError
    from attamba.data import DataError
    from attamba.exit_status import MISTAKE
    from attamba.harness.run import TASKS
    from attamba.train import CheckpointError

    own = ("--include_path", "--config", "-C")
    if len(sys.argv) > 2 and not any(word.partition("=")[0] in own for word in sys.argv):
        sys.argv += ["--include_path", str(TASKS)]
    try:
        cli_evaluate()
    except (ConfigError, CheckpointError, DataError) as error:
        print(f"attamba-lm-eval: error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
