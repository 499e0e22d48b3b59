"""Command line: train a checkpoint, export it as a model folder, evaluate the folder."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .corpus import Critic, Split, curate, read_documents, split_documents
from .names import Renamer
from .network import Shape
from .tokenizer import train_tokenizer
from .training import Trainer, TrainingOptions

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run one command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.run(options)


def run_train(options: argparse.Namespace) -> None:
    """Tokenizer and checkpoint from text files."""
    split = _read_split(options)
    critic = Critic(split.train)
    documents = curate(split.train, critic)
    log.info("%d documents, %d of them sound", len(split.train), len(documents))
    renamer = Renamer(options.rename_share, options.seed)
    tokenizer = _load_or_train_tokenizer(options, documents, renamer)
    trainer = Trainer(
        _shape(options, tokenizer), tokenizer, documents, renamer, _training_options(options)
    )
    if options.resume:
        trainer.resume(options.resume)
    trainer.run()


def run_export(options: argparse.Namespace) -> None:
    """A model folder from a checkpoint."""
    from .export import export_model

    export_model(options.checkpoint, options.tokenizer, options.output)
    log.info("wrote %s", options.output)


def run_evaluate(options: argparse.Namespace) -> None:
    """Losses on held-out documents and sample texts, as Markdown."""
    from .evaluation import report

    split = _read_split(options)
    print(report(options.model, split, seed=options.seed))


def _read_split(options: argparse.Namespace) -> Split:
    documents = read_documents(options.text, options.separator)
    return split_documents(documents, options.held_out_share)


def _load_or_train_tokenizer(
    options: argparse.Namespace, documents: Sequence[str], renamer: Renamer
) -> Tokenizer:
    path: Path = options.checkpoint.parent / "tokenizer.json"
    if options.resume:
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(map(renamer, documents), options.vocabulary)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def _shape(options: argparse.Namespace, tokenizer: Tokenizer) -> Shape:
    return Shape(
        vocabulary=tokenizer.get_vocab_size(),
        hidden=options.hidden,
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.kv_heads,
        mlp=options.mlp,
        context=options.context,
    )


def _training_options(options: argparse.Namespace) -> TrainingOptions:
    return TrainingOptions(
        minutes=options.minutes,
        tokens_per_step=options.tokens_per_step,
        learning_rate=options.learning_rate,
        seed=options.seed,
        checkpoint=options.checkpoint,
        compile=options.compile,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_demo_model", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads for arithmetic")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything random")
    commands = parser.add_subparsers(required=True)
    _add_train(commands.add_parser("train", help="train a tokenizer and a checkpoint"))
    _add_export(commands.add_parser("export", help="write a model folder from a checkpoint"))
    _add_evaluate(commands.add_parser("evaluate", help="judge a model folder"))
    return parser


def _add_train(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_train)
    _add_text(command)
    command.add_argument("--checkpoint", type=Path, required=True, help="file to write")
    command.add_argument("--resume", type=Path, help="checkpoint to go on from")
    command.add_argument("--minutes", type=float, default=55.0, help="wall-clock training time")
    command.add_argument("--vocabulary", type=int, default=2048, help="tokens to learn")
    command.add_argument("--hidden", type=int, default=256)
    command.add_argument("--layers", type=int, default=6)
    command.add_argument("--heads", type=int, default=8)
    command.add_argument("--kv-heads", type=int, default=4)
    command.add_argument("--mlp", type=int, default=704)
    command.add_argument("--context", type=int, default=1024, help="longest window")
    command.add_argument("--tokens-per-step", type=int, default=4096, help="batch size, in tokens")
    command.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak rate")
    command.add_argument(
        "--rename-share", type=float, default=0.65, help="share of documents with new names"
    )
    command.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile"
    )


def _add_export(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_export)
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    command.add_argument("--output", type=Path, required=True, help="model folder to write")


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_evaluate)
    _add_text(command)
    command.add_argument("--model", type=Path, required=True, help="model folder")


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument("text", type=Path, nargs="+", help="text files, plain or .gz")
    command.add_argument("--separator", default="<|endofstory|>", help="line between documents")
    command.add_argument("--held-out-share", type=float, default=0.01)


if __name__ == "__main__":
    main()
