"""Memory against the proportion of selected tokens, without and with checkpointing, all weights and LoRA.

    python scripts/figures/memory_by_proportion.py

Reads the suite `proportions` of `scripts/bench/results/step_cpu.json`; writes `memory_by_proportion.png` beside this
file. Memory is what autograd keeps for the backward pass of one step.
"""

from pathlib import Path

from style import LOOKS, STEP_CPU, TRAINED, command, describe, panels, rows_of, save

from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_MIB


def draw(source: Path, output: Path) -> None:
    rows, _ = rows_of(source, "proportions")
    trained = [train for train in TRAINED if any(row["train"] == train for row in rows)]
    figure, axes = panels(trained, sharey=True)
    for train, panel in axes.items():
        for method, look in LOOKS.items():
            chosen = [row for row in rows if row["train"] == train and row["method"] == method]
            chosen.sort(key=lambda row: row["proportion"] or 0)
            values = [row["saved_bytes"] / BYTES_IN_MIB for row in chosen]
            if not chosen:
                continue
            if chosen[0]["proportion"] is None:
                panel.axhline(values[0], color=look.color, linestyle=look.dash, label=look.name)
            else:
                shares = [100 * row["proportion"] for row in chosen]
                panel.plot(shares, values, color=look.color, linestyle=look.dash, marker=look.marker, label=look.name)
        panel.set_title(TRAINED[train])
        panel.set_xlabel("selected tokens, % of the sequence")
        panel.set_xlim(0, 103)
        panel.set_xticks(range(0, 101, 20))
        panel.set_ylim(bottom=0)
    next(iter(axes.values())).set_ylabel("kept for the backward pass, MiB")
    figure.suptitle(describe(rows[0]), fontsize=9, color="#555555")
    handles, labels = next(iter(axes.values())).get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2 if len(labels) > 4 else len(labels), fontsize=9.5
    )
    save(figure, output)


if __name__ == "__main__":
    command(__doc__, STEP_CPU, draw, "memory_by_proportion.png")
