"""The tables of estimated memory, from committed reports of `estimate.py` and of scripts that call it.

Not a command: `scripts/docs.py` puts them into README and docs.
"""

from tables import BYTES_IN_GIB, METHOD_NAMES, markdown, read

# What estimate.py calls its rows with a chunked loss.
ESTIMATED_IN_CHUNKS = {
    "plain, chunked loss": "full_chunked",
    "gradient checkpointing + chunked loss": "checkpointing_chunked",
}


def estimate_table() -> str:
    """Estimated peaks, and the smallest card that holds them, of two models side by side."""
    names = {"llama_2_7b": "Llama-2-7B", "llama_3_8b": "Llama-3-8B"}
    reports = [read(f"estimate_{name}.json") for name in names]
    models = [{(row["weights"], row["method"]): row for row in report["rows"]} for report in reports]
    rows = []
    for weights, method in models[0]:
        name = METHOD_NAMES.get(ESTIMATED_IN_CHUNKS.get(method), method)
        row = [weights, f"**{name}**" if name.startswith("TokenTune") else name]
        for model in models:
            found = model[weights, method]
            card = f"{found['fits_gb'][0]} GB" if found["fits_gb"] else "none"
            kept, peak = (f"{found['bytes'][key] / BYTES_IN_GIB:.1f} GiB" for key in ("activations", "peak"))
            row += [kept, peak, card]
        rows.append(row)
    columns = [f"{name}: {what}" for name in names.values() for what in ("kept for backward", "peak", "smallest card")]
    return markdown(["trained", "method", *columns], rows)


def estimate_baselines_table() -> str:
    """Peaks with checkpointing: the logits of all tokens at once; the loss in chunks; 30 % of the tokens selected."""
    files = {2048: "estimate_llama_3_8b.json", 8192: "estimate_llama_3_8b_8192.json"}
    methods = {
        "gradient checkpointing": "all logits at once",
        "gradient checkpointing + chunked loss": "all tokens, the loss in chunks",
        "TokenTune + checkpointing": "**TokenTune, 30 %**",
    }
    rows = [
        [weights, f"{length:,}", *(peak_of(file, weights, method) for method in methods)]
        for weights in ("LoRA", "QLoRA")
        for length, file in files.items()
    ]
    return markdown(["trained", "tokens", *methods.values()], rows)


def peak_of(file: str, weights: str, method: str) -> str:
    row = next(row for row in read(file)["rows"] if (row["weights"], row["method"]) == (weights, method))
    return f"{row['bytes']['peak'] / BYTES_IN_GIB:.1f} GiB"


def sharded_table() -> str:
    """Estimated peaks and traffic of large models on one GPU and on several."""
    report = read("estimate_sharded.json")["rows"]
    counts = sorted({row["processes"] for row in report})
    names = {"llama-3-8b": "8B", "llama-3-70b": "70B"}
    found = {(row["model"], row["weights"], row["method"], row["processes"]): row["bytes"] for row in report}
    rows = []
    for model, weights, method in dict.fromkeys(key[:3] for key in found):
        row = [names[model], weights, f"**{method}**" if method.startswith("TokenTune") else method]
        for count in counts:
            figures = found[model, weights, method, count]
            sent = f", {figures['sent'] / BYTES_IN_GIB:.0f} GiB sent" if count > 1 else ""
            row.append(f"{figures['peak'] / BYTES_IN_GIB:.1f} GiB{sent}")
        rows.append(row)
    shares = [f"{count} GPUs, FSDP" if count > 1 else "1 GPU" for count in counts]
    return markdown(["model", "trained", "method", *shares], rows)


def longest_table() -> str:
    """The longest sequence that fits each card, by method."""
    report = read("estimate_longest.json")["rows"]
    cards = dict.fromkeys(row["memory_gb"] for row in report)
    found = {(row["weights"], row["method"], row["memory_gb"]): row["tokens"] for row in report}
    rows = []
    for weights, method in dict.fromkeys(key[:2] for key in found):
        name = f"**{method}**" if method.startswith("TokenTune") else method
        lengths = (found.get((weights, method, card)) for card in cards)
        rows.append([weights, name, *(f"{tokens:,}" if tokens else "none" for tokens in lengths)])
    return markdown(["trained", "method", *(f"{card} GB" for card in cards)], rows)
