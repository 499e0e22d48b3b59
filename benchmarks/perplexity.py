"""What a number type or a quantisation costs in quality: perplexity on text, beside float32.

    python -m benchmarks.perplexity
    python -m benchmarks.perplexity --model <directory> --text story.txt --dtypes float32 bfloat16

Without --text, on the stories of <TGIS_SHARED>/data/stories.txt.gz that the demo model was not
trained on (one in a hundred), where that file is; else on the stories in the demo model's README.
"""

import argparse
import json
import math
import os
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tools.train_demo_model.corpus import read_documents, split_documents
from torch.nn import functional

from tgis.demo import model_dir
from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.plan import Row, StepPlan, Want

MOST_TOKENS = 1024


def held_out_stories() -> list[str]:
    """See above; the tool that trained the demo model says which stories it left out."""
    path = Path(os.environ.get("TGIS_SHARED", "../shared")) / "data" / "stories.txt.gz"
    if not path.exists():
        readme = (model_dir() / "README.md").read_text("utf-8")
        quotes = re.findall(r"(?:^>.*\n)+", readme, re.MULTILINE)
        return [re.sub("^> ", "", quote, flags=re.MULTILINE).strip() for quote in quotes]
    documents = read_documents([path], "<|endofstory|>")
    return split_documents(documents, held_out_share=0.01).held_out


def perplexity(engine: native.NativeEngine, sequences: list[list[int]]) -> float:
    """exp of the mean loss per predicted token, every sequence alone."""
    loss, count = 0.0, 0
    for ids in sequences:
        logits = engine.forward(StepPlan([Row(0, 0, ids, 0, Want.ALL)]))
        losses = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
        loss += float(losses)
        count += len(ids) - 1
        engine.release([0])
    return math.exp(loss / count)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=model_dir())
    parser.add_argument("--text", type=Path, help="one text, cut into pieces")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quantize", nargs="+", default=["int8-dynamic"])
    parser.add_argument("--tokens", type=int, default=40_000, help="of the text at most")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    texts = [arguments.text.read_text("utf-8")] if arguments.text else held_out_stories()
    sequences: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        sequences += [ids[i : i + MOST_TOKENS] for i in range(0, len(ids), MOST_TOKENS)]
        if sum(map(len, sequences)) > arguments.tokens:
            break
    sequences = [ids for ids in sequences if len(ids) > 1]
    print(f"{len(sequences)} pieces, {sum(map(len, sequences))} tokens")
    print("| type | perplexity | beside the first | seconds |\n|---|---|---|---|")
    first = None
    kinds = [(dtype, None) for dtype in arguments.dtypes]
    kinds += [(arguments.dtypes[-1], name) for name in arguments.quantize]
    config = json.loads((arguments.model / "config.json").read_text())
    for dtype, quantize in kinds:
        start = time.perf_counter()
        engine = native.load(arguments.model, config, getattr(torch, dtype), quantize=quantize)
        engine.allocate(CacheShape(1, MOST_TOKENS))
        value = perplexity(engine, sequences)
        first = first or value
        seconds = time.perf_counter() - start
        name = quantize or dtype
        print(f"| {name} | {value:.4f} | {value / first - 1:+.3%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
