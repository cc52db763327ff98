"""Distribution Matching Distillation in one file: Algorithm 1 of the paper on two modes in the plane, in a minute.

    python examples/dmd_in_one_file.py

The teacher is an exact mixture of two Gaussians (weights 3 : 1), so its denoiser is a formula and the outcome can be
checked. Student and fake score are small networks with EDM's preconditioning. Everything else is the library's:
`distmatch train` does the same for images, on any number of GPUs.
"""

import torch
from torch.nn.functional import mse_loss

from distmatch import Denoiser, Prediction
from distmatch.diffusion.losses import WEIGHTINGS, denoising_loss, matching_loss
from distmatch.diffusion.sampler import Steps, heun
from distmatch.models.mixture import MIXTURES
from distmatch.models.mlp import MLP

torch.manual_seed(0)
STEPS, BATCH, LAMBDA = 800, 128, 4.0

teacher = MIXTURES["toy2d"]()  # the real score; any Denoiser, (x_t, t, cond) -> x0, can stand here
schedule = teacher.schedule
student = Denoiser(MLP(), schedule, Prediction("edm"))
fake = Denoiser(MLP(), schedule, Prediction("edm"))
fake.load_state_dict(student.state_dict())  # line 2: both start from the same network, the teacher's where it has one
generate = Steps((schedule.t_max,)).sample  # G(z) = mu(prior_std z, t_max), one evaluation

# Section 3.3: pairs of noise and the image that the teacher's deterministic sampler makes of it.
z_pairs = torch.randn(1000, 2)
y_pairs = heun(teacher, schedule, z_pairs, None, 18).float()

student_optimizer = torch.optim.AdamW(student.parameters(), lr=1.5e-3)
fake_optimizer = torch.optim.AdamW(fake.parameters(), lr=2e-3)
# 1,000 noise levels from the lowest to the highest. The student's are drawn below sigma 0.47: at higher ones the two
# modes melt into one, and the far mode would be found even without pairs (Figure 3).
levels = schedule.grid(1000).flip(0).float()

for step in range(STEPS):
    z, rows = torch.randn(BATCH, 2), torch.randint(len(z_pairs), (BATCH // 2,))
    for group in student_optimizer.param_groups:
        group["lr"] = 1.5e-3 * min(1.0, 2 * (1 - step / STEPS))

    # Lines 5 to 13: the student's update.
    x = generate(student, schedule, z, None)
    t, eps = levels[torch.randint(20, 400, (BATCH,))], torch.randn(BATCH, 2)
    with torch.no_grad():
        x_t = schedule.add_noise(x, eps, t)
        x0_fake, x0_real = fake(x_t, t), teacher(x_t, t).float()
        weight = WEIGHTINGS["algorithm2"](x, x0_real, schedule.alpha(t), schedule.sigma(t))
    loss = matching_loss(x, x0_fake, x0_real, weight)  # its gradient in x is weight (mu_fake - mu_real)
    loss = loss + LAMBDA * mse_loss(generate(student, schedule, z_pairs[rows], None), y_pairs[rows])
    student_optimizer.zero_grad()
    loss.backward()
    student_optimizer.step()

    # Lines 15 to 19: the fake score's update, on the same images without their graph, at all noise levels.
    x, t, eps = x.detach(), levels[torch.randint(0, 1000, (BATCH,))], torch.randn(BATCH, 2)
    fake_loss = denoising_loss(fake(schedule.add_noise(x, eps, t), t), x, fake.weight(t))
    fake_optimizer.zero_grad()
    fake_loss.backward()
    fake_optimizer.step()
    if step % 200 == 0:
        print(f"step {step}: student {loss.item():.3f}, fake score {fake_loss.item():.3f}")

with torch.no_grad():
    samples = generate(student, schedule, torch.randn(4000, 2), None)
nearest = torch.cdist(samples.double(), teacher.means).argmin(1)
for mode, weight in enumerate(teacher.log_weights.exp().tolist()):
    print(f"mode {mode}: {(nearest == mode).double().mean().item():.1%} of the student's samples, {weight:.0%} wanted")
