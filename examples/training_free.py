"""Every training-free system on one host, each in a line: what it keeps and what a token reads.

    python examples/training_free.py

Uses a tiny random host; with a real one, `python train.py predictor=calibration` and
`predictor=sketch` make the folders.
"""

from __future__ import annotations

import torch

import gnomon
from gnomon.accounting import account
from gnomon.budget import Budget
from gnomon.calibration import calibrate
from gnomon.data.sources import SyntheticText
from gnomon.policies import (
    Cats,
    Chess,
    Core,
    FFSplit,
    Glass,
    Griffin,
    Sketch,
    SkipSublayers,
    Teal,
    TealAttention,
)
from gnomon.predictors import Sketch as SketchPredictor
from gnomon.predictors.calibration import Calibration
from gnomon.sketching import sketch
from gnomon.tiny import tiny_host

model, tokenizer = tiny_host("llama", num_hidden_layers=4)
spec = gnomon.describe(model)
calibration = Calibration.for_host(spec)
text = SyntheticText(block=64, tokens=2048)
calibrate(calibration, model, tokenizer, spec, text)
copies = SketchPredictor.for_host(spec, bits=2)  # of the host's own gate and up projections
sketch(copies, model, tokenizer, spec, text)

half, neurons = Budget(density=0.5), Budget(neurons=0.5)
policies = {
    "sketch": Sketch(copies.quantize(), neurons),
    "griffin": Griffin(neurons),
    "glass": Glass(calibration, neurons, weight=0.3),
    "cats": Cats(calibration, neurons),
    "chess": Chess(calibration, half),
    "teal": Teal(calibration, half),
    "teal_attention": TealAttention(calibration, Sketch(copies, half)),
    "skip_sublayers": SkipSublayers(Budget(heads=0.75), predictor=calibration, choose="similarity"),
    "ffsplit": FFSplit(calibration, heavy=0.25, rest="int4"),
    "core": Core(calibration, Griffin(neurons), share=0.2),
    "combined": SkipSublayers(
        layers=[3], inner=FFSplit(calibration, inner=Griffin(neurons), heavy=0.2)
    ),
}
prompt = tokenizer("the shadow of a sundial", return_tensors="pt")
for name, policy in policies.items():
    with torch.no_grad(), gnomon.sparsify(model, policy) as session:
        model.generate(**prompt, max_new_tokens=16, do_sample=False)
        density = session.density()
    bytes_ = account(policy, density).byte_density
    print(f"{name}: heads {density.heads:.2f} neurons {density.neurons:.2f} bytes {bytes_:.3f}")
