"""Terms of a user's, as a recipe imports them: one that trains a network of its own."""

import torch
from torch import nn
from torch.nn import functional as F

from distmatch.methods.terms import Trained
from distmatch.training.engine import features, unwrapped


class Judge:
    """A discriminator: a head on the features of a block of the fake score. It tells the two streams apart."""

    reads = ("noise", "pairs")

    def __init__(self, context, weight=1.0, block=0):
        self.name, self.weight, self.fake, self.block = context.name, weight, context.fake, block
        network = unwrapped(context.fake)
        with torch.no_grad(), features(network, [block]) as found:
            network(torch.zeros(1, *context.shape), torch.ones(1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.head = nn.Linear(found[block].shape[1], 1)
        self.trained = {"head": Trained(self.head, context.optimizer(self.head))}

    def draw(self, starts, share):
        return len(starts[0].z)

    def logits(self, samples):
        t = torch.ones(len(samples.x))
        with features(self.fake, [self.block]) as found:
            self.fake(samples.x, t, samples.cond)
        return self.head(found[self.block].mean((2, 3))).squeeze(1)

    def student_loss(self, drawn, samples):
        return F.softplus(-self.logits(samples)).mean()

    def fake_loss(self, drawn, samples):
        logits = self.logits(samples)
        return F.softplus(logits[:drawn]).mean() + F.softplus(-logits[drawn:]).mean()


class Reader:
    """It wants a stream that there is not."""

    reads = ("rollouts",)

    def __init__(self, context):
        self.name, self.weight = context.name, 1.0


class Odd(Judge):
    """Cannot be made."""

    def __init__(self, context):
        raise ValueError("by the test")
