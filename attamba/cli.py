"""The `attamba` command: arguments, and errors that a user can act on.

What the commands do is in attamba.commands, which is imported when one is run: `attamba --help`
does not wait for torch.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from attamba import __version__
from attamba.exit_status import BROKEN_PIPE, FAILED, INTERRUPTED, MISTAKE

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
"""How a key=value argument begins."""
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE}
"""Errors of the system that are no mistake in a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: done. 2: the user's mistake, told in one line on standard error (--debug: with traceback). 1:
    what failed after training had begun, a full disk, or a URL that cannot be reached, told
    likewise; another try may go on. 75: SIGTERM or SIGUSR1 during training, which has saved what it
    had: start it again. 130: Ctrl-C. 141: nobody reads standard output any more. See exit_status.
    """
    args = parse(argv)
    try:
        return _run(args)
    except BrokenPipeError:
        # Python flushes standard output once more on exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt as stopped:
        return _leave(stopped)
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, args.debug)
    except RuntimeError as error:
        if not _is_told(error):
            raise
        return _fail(error, args.debug)


def _run(args: argparse.Namespace) -> int:
    """The command itself; a rank of torchrun that fails ends without looking back.

    Its threads may wait for other ranks, which wait until this one's connections close.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return args.command(args)
    try:
        return args.command(args)
    except KeyboardInterrupt as stopped:
        status = _leave(stopped)
    except Exception as error:
        status = FAILED
        if isinstance(error, (ValueError, OSError, ImportError)) or _is_told(error):
            status = _fail(error, args.debug)
        else:
            traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave(stopped: KeyboardInterrupt) -> int:
    if os.environ.get("RANK", "0") == "0":  # torchrun stops all ranks alike
        print(f"\nattamba: {str(stopped) or 'interrupted'}", file=sys.stderr)
    return getattr(stopped, "exit_status", INTERRUPTED)


def _is_told(error: Exception) -> bool:
    """Is it an error of training that speaks to the user?"""
    from attamba.train import CheckpointError, TrainingDiverged
    from attamba.train.distributed import RankLost

    return isinstance(error, (CheckpointError, RankLost, TrainingDiverged))


def _may_pass(error: Exception) -> bool:
    """Not a mistake in the command?"""
    return getattr(error, "may_pass", False) or getattr(error, "errno", None) in PASSING


def _fail(error: Exception, debug: bool) -> int:
    status = FAILED if _may_pass(error) else MISTAKE
    if getattr(error, "is_echo", False):
        return status  # of torchrun's ranks, the one that it happened to tells it
    if debug:
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    else:
        message = str(error) or type(error).__name__
    print(f"attamba: error: {message}", file=sys.stderr)
    return status


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of a command line; exits with a usage message for those that are not known.

    key=value arguments may stand anywhere after the command.
    """
    args, extras = build_parser().parse_known_args(argv)
    if hasattr(args, "overrides"):
        # argparse ends a list of positional arguments at the first option, and lets an option
        # with many values take what follows it.
        data = getattr(args, "data", None) or []
        args.overrides += [word for word in [*extras, *data] if OVERRIDE.match(word)]
        extras = [word for word in extras if not OVERRIDE.match(word)]
        if data:
            args.data = [word for word in data if not OVERRIDE.match(word)]
    if extras:
        args.parser.error(f"unrecognized arguments: {' '.join(extras)}")
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="attamba",
        description="Attention over multi-token states: key/value caches P times smaller.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"attamba {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _delegated(commands, "demo", "attamba.demo.run", "train Attamba and a transformer, compare")
    _train(commands)
    _follow(commands)
    _eval(commands)
    _generate(commands)
    _export(commands)
    _import(commands)
    _consolidate(commands)
    _serve(commands)
    _delegated(
        commands, "launch", "attamba.launch.commands", "train on many GPUs, by SLURM or here"
    )
    _delegated(commands, "plan", "attamba.plan.commands", "memory, traffic and time of training")
    bench = commands.add_parser("bench", help="time and memory, measured")
    benches = bench.add_subparsers(metavar="WHAT", required=True)
    _delegated(benches, "data", "attamba.bench.data", "text to shards, against tokenizers alone")
    _delegated(benches, "decode", "attamba.bench.decode", "a decoding step, at many lengths")
    _delegated(benches, "kernels", "attamba.bench.kernels", "the operators alone, on a GPU")
    _delegated(benches, "tune", "attamba.bench.tune", "tile sizes of the attention kernels")
    _delegated(benches, "loop", "attamba.bench.loop", "training as it is, against a bare step")
    _delegated(benches, "train", "attamba.bench.train", "a training step, at many lengths")
    _delegated(benches, "hf", "attamba.bench.hf", "transformers' generate() against our own")
    study = commands.add_parser("study", help="experiments: run, report, solve")
    studies = study.add_subparsers(metavar="WHAT", required=True)
    importlib.import_module("attamba.studies.commands").add_commands(studies, _leaf)
    data = commands.add_parser("data", help="tokenize text, train a tokenizer")
    datas = data.add_subparsers(metavar="WHAT", required=True)
    _data_prepare(datas)
    _data_verify(datas)
    _data_tokenizer(datas)
    return parser


Commands = argparse._SubParsersAction  # what add_subparsers returns; argparse gives no other name


def _leaf(
    commands: Commands, name: str, help: str, command: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=command, parser=parser)
    return parser


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """A function of attamba.commands, imported when it is called."""
    return lambda args: getattr(importlib.import_module("attamba.commands"), name)(args)


def _delegated(commands: Commands, name: str, module_name: str, help: str) -> None:
    """A command of a module that offers add_arguments(parser) and run(args) -> int."""
    module = importlib.import_module(module_name)
    module.add_arguments(_leaf(commands, name, help, module.run))


def _train(commands: Commands) -> None:
    parser = _leaf(commands, "train", "train a model, or go on with training", _later("train"))
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="CONFIG key=value",
        help="a YAML file, if any, then keys that differ from it: data.train=texts/ optim.lr=1e-3",
    )
    parser.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="refuse a folder that holds a checkpoint, instead of going on from it",
    )


def _follow(commands: Commands) -> None:
    parser = _leaf(
        commands, "follow", "score a run's checkpoints while it trains", _later("follow")
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder; scores go to its eval.jsonl")
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (default: 8)")
    parser.add_argument(
        "--idle",
        type=float,
        metavar="SECONDS",
        help="end after so long without a checkpoint to score (default: when training ends)",
    )
    parser.add_argument(
        "--until-eof",
        action="store_true",
        help="end when standard input is closed, too, and what there is, is scored",
    )


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a run folder or a checkpoint folder")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="config keys to change at test time: mixer.chunk_size=4",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as saved)"
    )


def _text(parser: argparse.ArgumentParser, text_key: bool = True) -> None:
    parser.add_argument("--split-on", metavar="RE", help="start a new document at lines that match")
    if text_key:
        parser.add_argument(
            "--text-key", default="text", help="field of JSON lines and parquet (default: text)"
        )


def _eval(commands: Commands) -> None:
    parser = _leaf(commands, "eval", "score a checkpoint on text", _later("evaluate"))
    _checkpoint(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text files and folders, or a prepared folder (default: what the run held out)",
    )
    _text(parser)
    parser.add_argument(
        "--context",
        metavar="N|all",
        help="tokens of a window; all: whole documents (default: the run's data.seq_len)",
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: context / 2)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time (default: 8)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="score this many at most")
    parser.add_argument(
        "--sweep",
        metavar="FIELD=A,B,...",
        help="score at several values of a mixer's field: chunk_size=1,2,4,8,16",
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="score on tasks of the lm-eval harness instead: hellaswag,wikitext2_local=PATH",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="documents of each task (default: all)"
    )
    parser.add_argument("--json", metavar="OUT", help="write the figures to this file")


def _generate(commands: Commands) -> None:
    parser = _leaf(commands, "generate", "write text", _later("generate"))
    _checkpoint(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="repeat for several (default: stdin)"
    )
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt, less a final newline")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the likeliest that make up P"
    )
    parser.add_argument("--seed", type=int, help="of the sampling (default: a new one each time)")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; repeatable"
    )


def _export(commands: Commands) -> None:
    parser = _leaf(
        commands, "export", "write a checkpoint as a folder for transformers", _later("export")
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a run folder or a checkpoint folder")
    parser.add_argument("out", metavar="DIR", help="the folder to write; new, or empty")
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="FILE",
        help="scores for the model card: what `attamba eval --json` wrote, of text or of --tasks; "
        "repeatable",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: 5GB)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="put the model's code into the folder, for machines without this package",
    )


def _import(commands: Commands) -> None:
    parser = _leaf(
        commands, "import", "read a folder of transformers as a checkpoint", _later("import_folder")
    )
    parser.add_argument("folder", metavar="DIR", help="what export or save_pretrained wrote")
    parser.add_argument("out", metavar="OUT", help="the run folder to put the checkpoint in")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="bytes, or a tokenizer file (default: the folder's)"
    )


def _consolidate(commands: Commands) -> None:
    parser = _leaf(
        commands,
        "consolidate",
        "write a checkpoint of many ranks as one of whole files",
        _later("consolidate"),
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="a run folder or a checkpoint folder")
    parser.add_argument("out", metavar="OUT", help="the run folder to put the checkpoint in")


def _serve(commands: Commands) -> None:
    parser = _leaf(
        commands, "serve", "answer requests as `transformers serve` does", _later("serve")
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a run or checkpoint folder, or an exported one"
    )
    parser.add_argument("--host", default="localhost", help="default: localhost")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")


def _data_prepare(commands: Commands) -> None:
    parser = _leaf(
        commands,
        "prepare",
        "tokenize text into a folder, or go on where that was stopped",
        _later("data_prepare"),
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="SOURCE",
        help="text files, folders, patterns; data sets as hf:NAME[:CONFIG[:SPLIT[:FIELD]]]; "
        "recipes: fineweb-edu, dclm, slimpajama, or a .yaml file",
    )
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="bytes, a tokenizer.json, a SentencePiece .model, or a folder (default: bytes)",
    )
    _text(parser)
    parser.add_argument(
        "--shard-tokens", type=int, default=100_000_000, help="per file (default: 100000000)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="parts of the text at a time, by threads or processes; what is written does not "
        "depend on it (default: one for each core)",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="end after the shard that makes it so many"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="pass over records that are no text, and count them, instead of ending there",
    )


def _data_verify(commands: Commands) -> None:
    parser = _leaf(
        commands, "verify", "read a prepared folder, compare checksums", _later("data_verify")
    )
    parser.add_argument("folder", metavar="DIR", help="what prepare wrote, or its URL")


def _data_tokenizer(commands: Commands) -> None:
    parser = _leaf(commands, "tokenizer", "train a byte-level BPE", _later("data_tokenizer"))
    parser.add_argument("out", metavar="OUT", help="a folder, or a .json file")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="text files and folders")
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens, at least 257")
    _text(parser)


if __name__ == "__main__":  # torchrun -m attamba.cli train ...
    sys.exit(main())
