#!/usr/bin/env bash
# Tunes the demo's five prompts and measures them: writes prompts/ and the two tables of
# models/recipe/results.md.
#
#     cargo build --release && models/recipe/tune.sh            # prompts and both tables
#     models/recipe/tune.sh prompts                             # only the prompts and their table
#     models/recipe/tune.sh few                                 # only accuracy by number of examples
#
# The examples are those of `corpus.py` in examples/data; the test files are held out.
set -euo pipefail
cd "$(dirname "$0")/../.."
softserve=${SOFTSERVE:-target/release/softserve}
data=examples/data
what=${1:-all}
tasks=(topic sentiment translation question-answering story)

describe() {
    case $1 in
        topic) echo "Which of ten topics a text is about" ;;
        sentiment) echo "Whether a text is positive or negative" ;;
        translation) echo "English to French" ;;
        question-answering) echo "Answers a question about the text before it" ;;
        story) echo "A very short story about what the input names" ;;
    esac
}

# The score that a task is judged by, from eval's JSON: the tuned column, then bare, then in words.
score() {
    python3 - "$1" <<'PY'
import json, sys
report = json.load(open(sys.argv[1]))
pick = lambda m: m["accuracy"] if "accuracy" in m else (m["exact_match"] if report["task"] != "story" else m["chrf"] / 100)
print(" ".join(f"{100 * pick(c['metrics']):.1f}" for c in report["columns"]))
PY
}

if [ "$what" != few ]; then
    for task in "${tasks[@]}"; do
        echo "== $task"
        "$softserve" tune --type prompt --task "$task" --description "$(describe "$task")" --prompts prompts \
            --data "$data/$task/train.jsonl" --eval-data "$data/$task/dev.jsonl"
        rm -rf "prompts/.tune-$task"
        "$softserve" eval --task "$task" --prompts prompts --data "$data/$task/test.jsonl" --json > "/tmp/$task.json"
        score "/tmp/$task.json"
    done
    {
        echo "| task | score | tuned prompt | no prompt | instruction in words |"
        echo "|---|---|---|---|---|"
        for task in "${tasks[@]}"; do
            read -r tuned bare words < <(score "/tmp/$task.json")
            case $task in
                topic|sentiment) name=accuracy ;;
                story) name=chrF2 ;;
                *) name="exact match" ;;
            esac
            echo "| $task | $name | $tuned | $bare | $words |"
        done
    } > models/recipe/scores.md
    cat models/recipe/scores.md
fi

if [ "$what" != prompts ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    {
        echo "| examples | topic | sentiment | translation | question-answering |"
        echo "|---|---|---|---|---|"
    } > models/recipe/few.md
    for n in 8 32 128 512; do
        row="| $n |"
        for task in topic sentiment translation question-answering; do
            head -n "$n" "$data/$task/train.jsonl" > "$work/train.jsonl"
            # A few examples do not show every label.
            labels=()
            case $task in
                topic) labels=(--labels animals,food,health,home,money,music,sport,technology,travel,weather) ;;
                sentiment) labels=(--labels negative,positive) ;;
            esac
            "$softserve" tune --type prompt --task "$task" "${labels[@]}" --prompts "$work/$n" --data "$work/train.jsonl" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
            "$softserve" eval --task "$task" --prompts "$work/$n" --data "$data/$task/test.jsonl" --json > "$work/eval.json"
            read -r tuned _ < <(score "$work/eval.json")
            row+=" $tuned |"
        done
        echo "$row" | tee -a models/recipe/few.md
    done
fi
