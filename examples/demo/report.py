"""What the demo writes down: report.json, and report.md with one picture.

Promises: every number comes from the run's measurements. Never rounds in JSON.
"""

import json
from pathlib import Path
from statistics import mean

import matplotlib


matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

from benchmarks.publish import table
from benchmarks.record import commit, machine, versions


WAYS = {
    "before": "before",
    "with its pack": "with its pack",
    "second pack alone": "with the second pack instead",
    "unloaded": "unloaded again",
}
KINDS = {"taught": "taught phrasings", "unseen": "phrasings never taught"}
COLORS = ("#9a9a9a", "#2a7f62", "#d08c2f", "#bdbdbd")


def write_report(out: Path, report: dict) -> None:
    """Completes the report with versions and machine and writes all files.

    Args:
        out (`Path`): the run's folder.
        report (`dict`): measurements, as `examples.demo` makes them.
    """
    report |= {"versions": versions(), "commit": commit(), "machine": machine(out)}
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(report, out / "answers.png")
    (out / "report.md").write_text(as_markdown(report), encoding="utf-8")


def share(found: dict) -> float:
    """Right answers of all texts."""
    return found["right"] / found["texts"]


def counted(found: dict | None) -> str:
    """Right answers as a table says them: "93.0 % (186 of 200)"."""
    if found is None:
        return "not asked"
    return f"{share(found):.1%} ({found['right']} of {found['texts']})".replace("%", " %")


def identical_texts(found: dict) -> str:
    """Texts whose logits are the same, of all: "64 of 64"."""
    return f"{round(found['texts_identical'] * found['texts'])} of {found['texts']}"


def draw(report: dict, path: Path) -> None:
    """One bar for each kind of phrasing and each way."""
    figure, axis = plt.subplots(figsize=(8, 3.4))
    width, middles = 0.8 / len(WAYS), {kind: [] for kind in KINDS}
    for place, (way, label) in enumerate(WAYS.items()):
        found = {kind: report["first"][way][kind] for kind in KINDS if kind in report["first"][way]}
        places = [list(KINDS).index(kind) + place * width for kind in found]
        for kind, middle in zip(found, places, strict=True):
            middles[kind].append(middle)
        bars = axis.bar(places, [100 * share(of) for of in found.values()], width, label=label, color=COLORS[place])
        axis.bar_label(bars, fmt="%.0f", fontsize=9)
    axis.set_xticks([mean(own) for own in middles.values()], KINDS.values())
    axis.set_ylim(0, 108)
    axis.set_ylabel(f"right answers, % ({report['facts']['first']} facts)")
    axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=len(WAYS), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def ten_table(report: dict) -> str:
    """The ten questions, answers side by side; right ones are bold."""

    def cell(text: str, right: bool) -> str:
        text = text.replace("|", "/").replace("*", "") or "(nothing)"
        return f"**{text}** ✓" if right else text

    return table(
        ["question, in a phrasing never taught", "right answer", "before", "with the pack"],
        [
            [row["question"], row["answer"], cell(row["before"], row["right_before"]), cell(row["after"], row["right"])]
            for row in report["ten"]
        ],
    ).replace("---:", "---")  # text, and no numbers


def right_table(report: dict) -> str:
    """Right answers of the first pack's facts in all ways, and of the second's."""
    rows = [
        [f"first pack, {label}", *(counted(report["first"][way].get(kind)) for kind in KINDS)]
        for way, label in WAYS.items()
    ]
    for way, of in report["second"].items():
        rows.append([f"second pack, {WAYS[way]}", *(counted(of[kind]) for kind in KINDS)])
    return table(["facts", *KINDS.values()], rows)


def relation_table(report: dict) -> str:
    """Right answers with the pack, relation by relation."""
    found = report["first"]["with its pack"]
    return table(
        ["relation, with the pack", *KINDS.values()],
        [[name, *(counted(found[kind]["relations"][name]) for kind in KINDS)] for name in found["taught"]["relations"]],
    )


def factbook_table(report: dict) -> str:
    """What both packs together change in other texts."""
    rows = []
    for kind, found in report["factbook"].items():
        losses = [f"{found[key]:.4f}" for key in ("loss_before", "loss")]
        rows.append([kind, identical_texts(found), *losses, f"{found['largest_difference']:.2g}"])
    heads = ["World Factbook, texts", "logits identical", "loss without packs", "loss with both", "largest difference"]
    return table(heads, rows)


def how_taught(report: dict) -> str:
    """One paragraph on what was taught."""
    facts, pack = report["facts"], report["packs"]["first"]
    return (
        f"{facts['first']} facts about {facts['subjects']} subjects of WordNet, each answered wrongly by the model in "
        f"all nine phrasings that are asked ({facts['left_out_as_known']} others, of which it knows one, were left "
        f"out), were taught in seven of them: {pack['texts']} texts, {pack['passes']} passes, "
        f"{report['seconds']['teach']:.0f} seconds. The pack holds {pack['records']:,} records in "
        f"{pack['bytes'] / 1e6:.1f} MB. No weight of the model changed. A new process loaded the saved folders and "
        "measured everything below."
    )


def what_is_equal(report: dict) -> str:
    """Swap, removal and undo in sentences."""
    same, gone = report["identical"], report["removed"]
    texts = same["texts"]
    left = gone["right"]["taught"]["right"] + gone["right"]["unseen"]["right"]
    asked = gone["right"]["taught"]["texts"] + gone["right"]["unseen"]["texts"]
    return "\n".join(
        [
            f"- The pack changes the logits of {same['changed_by_the_pack']} of {texts} questions about its facts.",
            f"- A second pack beside it: {same['beside_the_second_pack']} of {texts} have the same logits, bit for "
            f"bit. The second pack in and out again: {same['after_the_second_pack']} of {texts}.",
            f"- All packs unloaded: {same['unloaded']} of {texts} have the logits of the model that never loaded one.",
            f"- {gone['person']} removed from the file ({gone['records_removed']} records, {gone['facts']} facts): "
            f"{left} of {asked} texts about that name are still answered, {gone['as_never_taught']} of "
            f"{gone['questions']} questions have the logits of a model that was never taught, and "
            f"{gone['others_identical']} of {gone['others']} questions about the others keep their logits.",
        ]
    )


def as_markdown(report: dict) -> str:
    """The report for a reader."""
    seconds = ", ".join(f"{step} {value:.0f}" for step, value in report["seconds"].items())
    minutes = sum(report["seconds"].values()) / 60
    return "\n\n".join(
        [
            f"# {report['donor']}, taught {report['facts']['first']} facts",
            how_taught(report),
            "## Ten questions",
            ten_table(report),
            "## All facts",
            right_table(report),
            "![right answers](answers.png)",
            relation_table(report),
            "## Swap, remove, undo",
            what_is_equal(report),
            "## Other text",
            factbook_table(report),
            "## How",
            f"`python -m examples.demo` at {report['commit']} on {report['machine']['cores']} cores "
            f"({report['machine']['cpu']}). Seconds: {seconds}; {minutes:.1f} minutes in all.",
            "Memory: `" + json.dumps(report["memory"]) + "`. Packs: `" + json.dumps(report["packs"]) + "`.",
            "Versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".\n",
        ]
    )
