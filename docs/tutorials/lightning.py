"""Train with Lightning.

You train a small network on handwritten digits with weight norm: you look at the plan first, train
with the callback, stop and resume without losing a bit, and take home plain weights.
"""

# %%
import lightning as L
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import wn_surgery as wn
from wn_surgery.callbacks.lightning import WeightNorm

# %% [markdown]
# ## A model without weight norm
#
# The model says nothing about weight norm. The one thing to change in it is the optimizer:
# `parameter_groups` keeps weight decay away from g and from biases, and works on a plain model too.


# %%
class Digits(L.LightningModule):
    """Two convolutions and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(wn.parameter_groups(self, weight_decay=0.01), lr=3e-3)


images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
train, test = (x[:1440], y[:1440]), (x[1440:], y[1440:])

# %% [markdown]
# ## Look first
#
# Weight norm goes on the convolutions and the head, but not on the first layer. The last rule that
# matches a parameter decides. `plan` changes nothing:

# %%
rules = [
    {"types": ["Conv2d", "Linear"]},
    {"action": "skip", "names": "body.0"},
]
print(wn.plan(Digits(), rules))

# %% [markdown]
# ## Train
#
# Give the rules to the callback. It applies them before the optimizer is built, sets g and the
# biases from the first batch, and evaluates with weights that are computed once.


# %%
def fit(epochs, resume=None, **options):
    """Train a new model, or go on from a checkpoint."""
    L.seed_everything(0, verbose=False)
    model = Digits()
    callback = WeightNorm(rules, init_from_batch=True, **options)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    batches = DataLoader(TensorDataset(*train), batch_size=64)
    trainer.fit(model, batches, ckpt_path=resume)
    trainer.save_checkpoint(f"epoch{epochs}.ckpt")
    return model.eval(), callback


model, callback = fit(epochs=4, export_to="digits.safetensors")
print(callback.report)
print("set from the first batch:", *callback.initialization.initialized)

# %% [markdown]
# The optimizer trains g and v in place of the two weights, and the network has learned something:

# %%
for site in wn.sites(model):
    if site.normed:
        print(site.name, tuple(site.held.g.shape), tuple(site.held.v.shape))
with torch.no_grad():
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
print("more than 80 % of the test images are right:", bool(accuracy > 0.8))

# %% [markdown]
# ![g and the effective learning rate of six layers](../images/training.png)
#
# `log_every_n_steps=` logs g, ‖v‖ and the effective learning rate of each layer. The picture shows
# them for a longer training ([examples/digits_tcn.py](../../examples/digits_tcn.py)). Weight norm
# makes ‖v‖ grow, and the effective learning rate lr/‖v‖² fall, so it is worth a look when a run
# stops learning.
#
# ## Stop and resume
#
# A checkpoint holds g and v and says which rules made them. Train two epochs, then two more from
# the checkpoint. The result has the same bits as four epochs in one go:

# %%
fit(epochs=2)
resumed, _ = fit(epochs=4, resume="epoch2.ckpt")
same = all(map(torch.equal, resumed.state_dict().values(), model.state_dict().values()))
print("the same bits:", same)

# %% [markdown]
# With other rules the checkpoint is refused, since its optimizer would not fit:

# %%
rules = [{"types": "Linear"}]
try:
    fit(epochs=4, resume="epoch2.ckpt")
except wn.CheckpointMismatchError as error:
    print(error)

# %% [markdown]
# ## Take home plain weights
#
# `export_to=` has written the weights without weight norm at the end of the first training. They
# load into the class as it is, without this library:

# %%
plain = Digits().eval()
plain.load_state_dict(load_file("digits.safetensors"))
with torch.no_grad():
    print("the same outputs:", torch.equal(plain(test[0]), model(test[0])))

# %% [markdown]
# If you have only a checkpoint, strip it: `wn-surgery strip epoch4.ckpt plain.ckpt`
# ([the command line](../cli.md)). All options of the callback: [Lightning](../lightning.md).
