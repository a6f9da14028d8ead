"""Draws what `tune.py --results` wrote: accuracy against the number of examples, and against seconds of tuning. See README.md beside it."""

import argparse
import json
import math
import pathlib
from collections import defaultdict

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 220, 48, 56
COLOURS = {"softserve": "#145ac8", "TF-IDF": "#555f6e", "PEFT prompt": "#c85a14", "PEFT prefix": "#8a3fa8", "PEFT p-tuning": "#b08a00", "PEFT lora": "#2a8a4a",
           "in the context": "#b02a4a"}
NAMES = {"softserve": "softserve tune, defaults", "TF-IDF": "TF-IDF, logistic regression", "PEFT prompt": "PEFT prompt tuning", "PEFT prefix": "PEFT prefix tuning",
         "PEFT p-tuning": "PEFT P-tuning", "PEFT lora": "PEFT LoRA, rank 16", "in the context": "examples in the context"}


def by_examples(records):
    """For each method the accuracies at each number of examples: of the default options, and of the best learning rate."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in records:
        if not record.get("options"):
            found[record["method"]][record["examples"]][record.get("rate")].append(100 * record["likeliest"])
    mean = lambda values: sum(values) / len(values)
    return {method: {x: max(rates.values(), key=mean) for x, rates in sizes.items()} for method, sizes in found.items()}


def by_seconds(records, examples):
    """For each method the accuracies at each duration, on so many examples: of runs of different numbers of steps."""
    found = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["examples"] == examples and "seconds" in record:
            key = record["steps"] if "steps" in record else record["options"]
            found[record["method"]][key].append((record["seconds"], 100 * record["likeliest"]))
    series = {}
    for method, runs in found.items():
        series[method] = {sum(x for x, _ in points) / len(points): [y for _, y in points] for points in runs.values()}
    return series


def nice(low, high):
    """Ticks of a logarithmic axis: 1, 2 and 5 times powers of ten."""
    ticks = [m * 10**e for e in range(-1, 6) for m in (1, 2, 5)]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def draw(series, title, label, marks, path):
    """A line for each method over a logarithmic axis; a bar from the lowest to the highest accuracy where there are several."""
    xs = [x for points in series.values() for x in points]
    low, high = min(xs) / 1.15, max(xs) * 1.15
    top = min(100, 10 * math.ceil(max(y for points in series.values() for ys in points.values() for y in ys) / 10))
    x_of = lambda x: LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / low) / math.log(high / low)
    y_of = lambda y: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / top
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="14">',
           f'<title>{title}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', f'<text x="{LEFT}" y="26" font-size="17">{title}</text>']
    for y in range(0, top + 1, 10):
        out.append(f'<path d="M{LEFT} {y_of(y):.1f}H{WIDTH - RIGHT}" stroke="#e4e6eb"/>'
                   f'<text x="{LEFT - 8}" y="{y_of(y) + 5:.1f}" text-anchor="end">{y}%</text>')
    for x in marks or nice(low, high):
        out.append(f'<text x="{x_of(x):.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{label}</text>')
    mean = lambda ys: sum(ys) / len(ys)
    ends = []
    for method, points in series.items():
        colour = COLOURS[method]
        at = sorted(points.items())
        out.append('<path fill="none" stroke-width="2" stroke="{}" d="{}"/>'.format(
            colour, "".join(f"{'ML'[i > 0]}{x_of(x):.1f} {y_of(mean(ys)):.1f}" for i, (x, ys) in enumerate(at))))
        for x, ys in at:
            out.append(f'<circle cx="{x_of(x):.1f}" cy="{y_of(mean(ys)):.1f}" r="4" fill="{colour}"/>')
            if len(ys) > 1:
                out.append(f'<path d="M{x_of(x):.1f} {y_of(min(ys)):.1f}V{y_of(max(ys)):.1f}" stroke="{colour}"/>')
        ends.append((y_of(mean(at[-1][1])), method))
    # The names stand beside the ends of their lines, in their order and without covering one another.
    at = 0
    for y, method in sorted(ends):
        at = max(y, at + 20)
        out.append(f'<text x="{WIDTH - RIGHT + 12}" y="{at + 5:.1f}" fill="{COLOURS[method]}">{NAMES[method]}</text>')
    path.write_text("\n".join(out) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("."), help="the folder of the pictures")
    parser.add_argument("--examples", type=int, default=256, help="the number of examples of the picture over seconds")
    args = parser.parse_args()
    records = [json.loads(line) for line in args.results.read_text().splitlines() if line.strip()]
    sizes = by_examples(records)
    marks = sorted({x for points in sizes.values() for x in points})
    draw(sizes, "Accuracy by number of examples", "examples (of 10 labels together)", marks, args.output / "accuracy-examples.svg")
    draw(by_seconds(records, args.examples), f"Accuracy by seconds of tuning, {args.examples} examples", "seconds on two cores", None,
         args.output / "accuracy-seconds.svg")


if __name__ == "__main__":
    main()
