#!/usr/bin/env bash
# The whole path once, on a world that needs no download: `make demo`. Resumes where it stopped.
set -euo pipefail
demo=${1:-demo}

step() { printf '\n== %s\n' "$1"; }

step "1/5 render 1,500 clips with sound"
python -m tools.make_clips --out "$demo/clips" --count 1500 --seconds 2 --size 64 --fps 16
step "2/5 encode them once into latent shards"
python -m pipeline.encode --src "$demo/clips" --out "$demo/shards" --config configs/encode/demo.yaml
step "3/5 train one transformer on all three tasks"
deepspeed train/main.py --config configs/train/demo.yaml \
    "data.root=$demo/shards" "run_dir=$demo/run"
step "4/5 generate held-out clips"
python -m train.sample --checkpoint "$demo/run" --task v2a --data "$demo/shards" --num 64 --out "$demo/v2a"
for task in t2av a2v; do
    python -m train.sample --checkpoint "$demo/run" --task "$task" --data "$demo/shards" --num 8 --out "$demo/$task"
done
step "5/5 score: does the sound hit when the shapes do?"
python -m tools.score_onsets --samples "$demo/v2a" --truth "$demo/clips"
printf '\nGalleries to open in a browser:\n'
printf '  %s\n' "$PWD/$demo"/{v2a,t2av,a2v}/index.html
