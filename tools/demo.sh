#!/usr/bin/env bash
# The whole path once, on a world that needs no download: `make demo`. A second call goes on where
# the first stopped. NUM_CLIPS, STEPS and SAMPLES make it smaller than what the README reports.
set -euo pipefail
demo=${1:-demo}

step() { printf '\n== %s\n' "$1"; }

step "1/5 render clips with sound"
python -m tools.make_clips --out "$demo/clips" --count "${NUM_CLIPS:-1500}"
step "2/5 encode them once into latent shards"
python -m pipeline.encode --src "$demo/clips" --out "$demo/shards" --config configs/encode/demo.yaml
step "3/5 train one transformer on all three tasks"
deepspeed train/main.py --config configs/train/demo.yaml \
    "data.root=$demo/shards" "run_dir=$demo/run" ${STEPS:+"steps=$STEPS"}
step "4/5 generate held-out clips"
sample() {
    python -m train.sample --checkpoint "$demo/run" --data "$demo/shards" \
        --task "$1" --num "$2" --out "$demo/$1"
}
sample v2a "${SAMPLES:-64}"
sample t2av "${SAMPLES:-8}"
sample a2v "${SAMPLES:-8}"
step "5/5 score: does the sound hit when the shapes do?"
python -m tools.score_onsets --samples "$demo/v2a" --truth "$demo/clips"
printf '\nGalleries to open in a browser:\n'
printf '  %s\n' "$PWD/$demo"/{v2a,t2av,a2v}/index.html
