"""Peak memory of `kleash measure` at a large vocabulary, and whether it grows with what is measured.

    python benchmarks/measure_memory.py
    python benchmarks/measure_memory.py --responses 8 32 --prompt-tokens 2048 --tied

Each row is a process of its own: two Llama-shaped models with random weights, built first; then a whole measurement,
every response as long as it may be (no token closes one). Extra memory is the peak resident size during it (VmHWM,
reset before) less what was resident before: what stands there beside the weights. Beside it what the logits
[responses, time, vocab] of both models would take in float32.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import tiny_tokenizer

from kleash.measurement import MeasureConfig, measure

MIB = 2**20


@dataclass(frozen=True)
class Work:
    """The shape of the models, of the prompts and of the responses."""

    responses: tuple[int, ...] = (8, 32, 128)
    batch: int = 64
    prompt_tokens: int = 16
    new_tokens: int = 512
    vocab: int = 128256
    layers: int = 2
    width: int = 256
    tied: bool = False
    """Head and embeddings are one tensor."""
    mapped: int = 0
    """Responses that are kept token by token, as for the page."""
    threads: int = 2
    alone: bool = False
    """Print the figures of one process, for the first number of responses, as JSON."""


def random_model(work: Work, seed: int) -> PreTrainedModel:
    """A model whose every token is possible, and none closes a response."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=work.vocab,
        hidden_size=work.width,
        intermediate_size=4 * work.width,
        num_hidden_layers=work.layers,
        num_attention_heads=work.width // 64,
        num_key_value_heads=work.width // 64,
        max_position_embeddings=work.prompt_tokens + work.new_tokens,
        tie_word_embeddings=work.tied,
        **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id")),
    )
    return AutoModelForCausalLM.from_config(config).eval()


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def measured_alone(work: Work) -> dict[str, float]:
    """One measurement in this process."""
    torch.set_num_threads(work.threads)
    tokenizer = tiny_tokenizer(pad_token="w0", words=[f"w{number}" for number in range(work.vocab)])
    policy, reference = random_model(work, 0), random_model(work, 1)
    prompts = [" ".join(f"w{7 * place + row}" for place in range(work.prompt_tokens)) for row in range(4)]
    config = MeasureConfig(samples=work.responses[0], max_new_tokens=work.new_tokens, batch=work.batch)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = time.perf_counter()
    found = measure(policy, reference, prompts=prompts, config=config, tokenizer=tokenizer, mapped=work.mapped)
    seconds = time.perf_counter() - start
    assert found.response_length.mean == work.new_tokens
    weights = sum(p.numel() * p.element_size() for model in (policy, reference) for p in model.parameters())
    return {"extra": status("VmHWM") - before, "seconds": seconds, "weights": weights}


def main(work: Work) -> None:
    """Print a row for each number of responses."""
    if work.alone:
        print(json.dumps(measured_alone(work)))
        return
    shape = f"V={work.vocab} L={work.layers} H={work.width} {'tied' if work.tied else 'untied'}"
    print(f"{shape} prompt={work.prompt_tokens} response={work.new_tokens} batch={work.batch} mapped={work.mapped}")
    print("| responses | extra at the peak | weights of both | logits of both would take | seconds per response |")
    print("|---|---|---|---|---|")
    for responses in work.responses:
        fields = {**asdict(work), "responses": responses, "alone": True}
        words = [word for name, value in fields.items() for word in _flag(name, value)]
        ended = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(ended.stderr)
        found = json.loads(ended.stdout.splitlines()[-1])
        logits = 2 * 4 * responses * work.new_tokens * work.vocab
        print(
            f"| {responses} | {found['extra'] / MIB:.0f} MiB | {found['weights'] / MIB:.0f} MiB | "
            f"{logits / MIB:,.0f} MiB | {found['seconds'] / responses:.2f} |",
            flush=True,
        )


def _flag(name: str, value: int | bool) -> list[str]:
    """A field as tyro reads it."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [f"--{dashed}", str(value)]


if __name__ == "__main__":
    main(tyro.cli(Work, description=__doc__))
