"""Export a vocoder.

You take a vocoder from training to a file: you ask what weight norm would do to the export, make a
plain copy beside the live model, export that, and measure what came out. At the end you strip a
checkpoint for which you have no class.
"""

# %%
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import wn_surgery as wn
from wn_surgery import export

_ = torch.manual_seed(0)

# %% [markdown]
# ## The live model
#
# A small generator in the style of HiFi-GAN. It applies weight norm itself, as most vocoders do.


# %%
class Generator(nn.Module):
    """One upsampling layer and one residual block."""

    def __init__(self):
        super().__init__()
        self.conv_pre = weight_norm(nn.Conv1d(80, 64, 7, padding=3))
        self.up = weight_norm(nn.ConvTranspose1d(64, 32, 8, stride=4, padding=2))
        self.block = nn.ModuleList(
            weight_norm(nn.Conv1d(32, 32, 3, padding=width, dilation=width)) for width in (1, 3)
        )
        self.conv_post = weight_norm(nn.Conv1d(32, 1, 7, padding=3))

    def forward(self, mel):
        hidden = self.up(nn.functional.leaky_relu(self.conv_pre(mel), 0.1))
        for layer in self.block:
            hidden = hidden + layer(nn.functional.leaky_relu(hidden, 0.1))
        return torch.tanh(self.conv_post(nn.functional.leaky_relu(hidden)))


model = Generator().eval()
mel = torch.randn(1, 80, 20)
for site in wn.sites(model):
    if site.normed:
        print(site.name, site.layout, site.dim)

# %% [markdown]
# ## Ask first
#
# `check` reads the model and exports nothing. A live model goes into an ONNX file, which then
# computes each weight from g and v at each call:

# %%
print(export.check(model, "onnx"))

# %% [markdown]
# To quantize that file, onnxruntime needs plain weights:

# %%
print(export.check(model, "ort-quantize"))

# %% [markdown]
# ## A plain copy
#
# `stripped_copy` leaves the live model as it is, so it can train on. The copy has its own plain
# weights with the bits of the live ones, and shares the memory of everything else.

# %%
plain = export.stripped_copy(model)
print("normed:", sum(site.normed for site in wn.sites(plain)), "in the copy,", end=" ")
print(sum(site.normed for site in wn.sites(model)), "in the live model")
print(export.check(plain, "onnx").ok)

# %% [markdown]
# ## Export, and measure
#
# `verify` runs both sides on one input and says how far apart they are. `torch.export` is exact.

# %%
program = torch.export.export(plain, (mel,))
print("exact:", export.verify(model, program, mel).exact)
live = torch.export.export(model, (mel,))
print("nodes less than with weight norm:", len(live.graph.nodes) - len(program.graph.nodes))

# %% [markdown]
# onnxruntime has other kernels, so the last bits differ. Compare with a tolerance that you choose:

# %%
_ = torch.onnx.export(plain, (mel,), "vocoder.onnx", dynamo=True, verbose=False)
found = export.verify(model, "vocoder.onnx", mel)
print("within 1e-5:", found.max_abs < 1e-5)

# %% [markdown]
# ## A checkpoint without its class
#
# g and v are found by names and shapes, so a file can be stripped without the code that wrote it.
# In a shell it is `wn-surgery strip last.ckpt plain.ckpt`.

# %%
torch.save({"step": 100, "generator": model.state_dict()}, "last.ckpt")
print(wn.checkpoints.inspect("last.ckpt"))
done = wn.checkpoints.convert_file("last.ckpt", "plain.ckpt", to="plain")
print(len(done.weights), "weights are plain")

# %%
state = torch.load("plain.ckpt")["generator"]
plain.load_state_dict(state)
with torch.no_grad():
    print("the same bits:", torch.equal(plain(mel), model(mel)))

# %% [markdown]
# Every exporter with every layout: [Export](../export.md). Files: [Checkpoints](../checkpoints.md).
