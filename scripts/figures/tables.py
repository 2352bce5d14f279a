"""What the makers of tables share: a table as Markdown, a committed result, and the words for methods and weights."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
BYTES_IN_GIB = 2**30
METHOD_NAMES = {
    "full": "plain training",
    "full_chunked": "plain, loss in chunks",
    "checkpointing": "plain, gradient checkpointing",
    "checkpointing_chunked": "plain, gradient checkpointing, loss in chunks",
    "sequence_chunks": "plain, sequence in chunks of 512 tokens",
    "tokentune": "**TokenTune, 30 % of the tokens**",
    "tokentune_checkpointing": "**TokenTune, 30 %, checkpointing**",
    "tokentune_segments": "**TokenTune, 30 %, lowest memory**",
    "tokentune_offload": "**TokenTune, 30 %, checkpointing, offloaded**",
}
WEIGHTS = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))
