"""`transformers.generate` with a static batch. Arguments: model directory, precision (bf16)."""

import sys
import time

import torch
import transformers
from worker import Calls, work


def main() -> None:
    """Load, then work."""
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None

    def run(calls: Calls) -> dict[str, object]:
        new = max(new for _, new in calls)
        ids = torch.tensor([ids for ids, _ in calls])  # workloads of equal lengths only
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
        seconds = time.perf_counter() - start
        if out.shape[1] != ids.shape[1] + new:
            raise RuntimeError(f"{out.shape[1] - ids.shape[1]} tokens instead of {new}")
        return {"seconds": seconds, "first": [], "gaps": []}

    work(run, transformers.__version__)


if __name__ == "__main__":
    main()
