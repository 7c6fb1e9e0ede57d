"""What vLLM answers with a graft, in its own environment: `answers-RUNNER.json`. Imports nothing of the package.

Model runner V2 needs Triton, which has no compiler for CPUs: its kernels run in Triton's interpreter here, so V2's
speed says nothing.

Run: PYTHON_OF_VLLM tests/vllm_engine/served.py FOLDER RUNNER [CASE ...], with RUNNER v1 or v2
"""

import json
import os
import sys
import time
import types
from pathlib import Path


TOKENS = 64
SMALL_CACHE = 12  # blocks: too few for eight requests at once, so some are preempted
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def choose_runner(runner: str):
    """Sets the environment before vLLM is imported."""
    os.environ.update(ENVIRONMENT, VLLM_USE_V2_MODEL_RUNNER=str(int(runner == "v2")))
    if runner == "v2":
        os.environ["TRITON_INTERPRET"] = "1"
        from triton.backends import backends

        driver = types.SimpleNamespace(is_active=lambda: True)
        backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


def engine(model: Path, **settings):
    """An engine with settings of its own."""
    from vllm import LLM

    usual = {"enforce_eager": True, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "block_size": 32}
    return LLM(model=str(model), disable_log_stats=False, **usual, **settings)


def said(llm, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens after each prompt, all in one call."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def counted(llm, name: str) -> int:
    """A counter of the engine."""
    return int(next(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}"))


def batch_and_prefixes(folder: Path, told: dict) -> dict:
    llm = engine(folder / "graft", enable_prefix_caching=True)
    found = {"memory": said(llm, told["prompts"])}
    before = counted(llm, "prefix_cache_hits")
    return found | {"long": said(llm, told["long_prompts"]), "hits": counted(llm, "prefix_cache_hits") - before}


def chunked(folder: Path, told: dict) -> dict:
    llm = engine(folder / "graft", enable_prefix_caching=False, max_num_batched_tokens=13)
    return {"chunked": said(llm, told["long_prompts"])}


def preempted(folder: Path, told: dict) -> dict:
    llm = engine(folder / "graft", enable_prefix_caching=True, num_gpu_blocks_override=SMALL_CACHE)
    return {"preempted": said(llm, told["prompts"]), "preemptions": counted(llm, "num_preemptions")}


def packs(folder: Path, told: dict) -> dict:
    options = {"engram_packs": [str(folder / "people.engram-pack.safetensors")], "engram_placement": "disk"}
    return {"packs": said(engine(folder / "graft", additional_config=options), told["prompts"])}


def speed(folder: Path, told: dict) -> dict:
    """Seconds of the processor with the memory and without, in turns, so that other programs count little; V1 alone."""
    donor = json.loads((folder / "graft" / "config.json").read_text())["text_config"]["_name_or_path"]
    llms = {"memory": engine(folder / "graft", enable_prefix_caching=False)}
    llms["backbone"] = engine(Path(donor), enable_prefix_caching=False)
    seconds = {name: [] for name in llms}
    found = {name: said(llm, told["prompts"]) for name, llm in llms.items()}
    for _ in range(3):
        for name, llm in llms.items():
            began = time.process_time()
            said(llm, told["prompts"])
            seconds[name].append(time.process_time() - began)
    return {"seconds": seconds, **found}


CASES = {case.__name__: case for case in (batch_and_prefixes, chunked, preempted, packs, speed)}


def main(folder: Path, runner: str, names: list[str]):
    """Writes what each case found; each runs in a process of its own."""
    choose_runner(runner)
    told = json.loads((folder / "expected.json").read_text())
    for name in names:
        found = CASES[name](folder, told)
        (folder / f"{runner}-{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
