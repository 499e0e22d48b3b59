"""`text-generation-server quantize` (operations §6)."""

import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import MutableMapping
from pathlib import Path

import msgspec

from tgis.cli.model_files import download_weights, settings
from tgis.errors import ConfigError, ModelError
from tgis.hub.resolve import locate

_LIMITS = {
    "bits": (4, 8),
    "samples": (1, 100_000),
    "sample_length": (16, 1_000_000),
    "group_size": (-1, 1_000_000),
    "percdamp": (1e-6, 10),
}


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.description = (
        "Write a GPTQ checkpoint of a model, from any text of the kind that it will read and"
        " write. A run that was interrupted goes on where it was."
    )
    parser.add_argument("model_name", metavar="MODEL_NAME", help="name on the hub, or a directory")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="directory to make; must be new")
    parser.add_argument("--revision", help="branch, tag or commit [main]")
    parser.add_argument(
        "--calibration-file",
        metavar="FILE",
        help="UTF-8 text; its last tenth is held out to measure perplexity before and after",
    )
    parser.add_argument("--bits", type=int, default=4, help="of a weight, 4 or 8 [%(default)s]")
    parser.add_argument(
        "--group-size",
        type=int,
        default=128,
        help="input features that share a scale; -1 = all [%(default)s]",
    )
    parser.add_argument(
        "--percdamp",
        type=float,
        default=0.01,
        help="of the Hessian's mean diagonal, is added to it [%(default)s]",
    )
    parser.add_argument(
        "--act-order",
        action=BooleanOptionalAction,
        default=False,
        help="quantize input features with large inputs first [no]",
    )
    parser.add_argument(
        "--sym",
        action=BooleanOptionalAction,
        default=True,
        help="without zero points; other programs read that best [yes]",
    )
    parser.add_argument(
        "--samples", type=int, default=128, help="windows of text, at most [%(default)s]"
    )
    parser.add_argument(
        "--sample-length", type=int, default=2048, help="tokens of a window [%(default)s]"
    )
    parser.add_argument(
        "--trust-remote-code",
        action=BooleanOptionalAction,
        default=False,
        help="run Python code that comes with the model [no]",
    )
    parser.add_argument("--upload-to-model-id", metavar="NAME", help="upload the result to the hub")


def run(arguments: Namespace, environ: MutableMapping[str, str]) -> int:
    """Quantize."""
    _check(arguments)
    config = settings(environ)
    _fetch(arguments, environ, config.hf_hub_cache)
    config = msgspec.structs.replace(
        config,
        model_name=arguments.model_name,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code or config.trust_remote_code,
    )
    from tgis.engines.gptq_run import Task, quantise_model
    from tgis.quant.gptq import Options

    task = Task(
        output=Path(arguments.output_dir),
        calibration_file=Path(arguments.calibration_file),
        options=Options(
            bits=arguments.bits,
            group_size=arguments.group_size,
            damp_percent=arguments.percdamp,
            desc_act=arguments.act_order,
            sym=arguments.sym,
        ),
        num_samples=arguments.samples,
        sample_length=arguments.sample_length,
    )
    quantise_model(config, task, _report)
    if arguments.upload_to_model_id:
        _upload(task.output, arguments.upload_to_model_id)
    return 0


def _check(arguments: Namespace) -> None:
    for name, (low, high) in _LIMITS.items():
        value = getattr(arguments, name)
        flag = f"--{name.replace('_', '-')}"
        if not low <= value <= high:
            raise ConfigError(f"{flag}={value}: expected a number from {low} to {high}")
    if arguments.bits not in _LIMITS["bits"]:
        raise ConfigError(f"--bits={arguments.bits}: expected 4 or 8")
    if arguments.group_size != -1 and arguments.group_size < 1:
        raise ConfigError(f"--group-size={arguments.group_size}: expected a positive number or -1")
    if not arguments.calibration_file:
        raise ConfigError(
            "--calibration-file: name a text file of the kind that the model will read and write"
        )


def _fetch(arguments: Namespace, environ: MutableMapping[str, str], cache: str) -> None:
    """Download the model unless it is here."""
    try:
        locate(arguments.model_name, arguments.revision, cache)
    except ModelError:
        if os.path.exists(arguments.model_name):
            raise
        options = {"token": None, "extension": ".safetensors", "auto_convert": True, "workers": 5}
        download_weights(Namespace(**vars(arguments), **options), environ)


def _upload(output: Path, name: str) -> None:
    from huggingface_hub import HfApi

    from tgis.hub.refusals import explained  # brings the hub's library, which --help can do without

    with explained(name, "main", output):
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=output)
    _report(f"Uploaded to {name}")


def _report(line: str) -> None:
    print(line, flush=True)
