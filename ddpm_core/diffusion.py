"""The diffusion process: forward, posterior, what the network predicts, and the training loss.

Notation of Ho et al. 2020 (DDPM). Images are float tensors [N, C, H, W] in [-1, 1] (the formulas hold for any
shape [N, ...]); t is an integer tensor [N] in 1..T. Coefficients are tabled in float64, gathered by t and cast to
the images' dtype.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_core import losses
from ddpm_core.schedule import NoiseSchedule

Network = Callable[[Tensor, Tensor], Tensor]

PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("small", "large")


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) as the model has it: mean and variance, each [N, C, H, W], and the x0 behind the mean."""

    mean: Tensor
    variance: Tensor
    x0: Tensor


class GaussianDiffusion:
    """A noise schedule together with what the network predicts and the variance of the reverse steps.

    predict: "eps" (the noise), "x0" (the image) or "v" = signal_rate eps - noise_rate x0 (Salimans and Ho 2022,
    "Progressive distillation", appendix D).
    variance: that of p(x_{t-1} | x_t): "small", the posterior's beta_tilde_t, or "large", beta_t (DDPM, section
    3.2). At t = 1, where beta_tilde is 0, either is beta_tilde_2: it serves the decoder's likelihood alone, for
    sampling adds no noise there.

    ValueError for other values, and for "eps" on a schedule with zero terminal signal.
    """

    def __init__(self, schedule: NoiseSchedule, predict: str = "eps", variance: str = "small") -> None:
        if predict not in PREDICTIONS:
            raise ValueError(f"predict must be one of {', '.join(PREDICTIONS)}, not {predict!r}")
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, not {variance!r}")
        if predict == "eps" and schedule.alpha_bar[-1] == 0:
            raise ValueError("eps says nothing about x0 where no signal is left: predict v or x0 on this schedule")
        self.schedule = schedule
        self.predict = predict
        self.variance = variance
        self._tables = {torch.device("cpu"): _tables(schedule, variance)}

    @property
    def timesteps(self) -> int:
        """T."""
        return self.schedule.timesteps

    def respace(self, steps: int, spacing: str = "leading") -> "GaussianDiffusion":
        """The same process on `steps` of the timesteps (`NoiseSchedule.respace`)."""
        return GaussianDiffusion(self.schedule.respace(steps, spacing), self.predict, self.variance)

    # Forward.

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, a draw of q(x_t | x_0) (DDPM, eq. 4)."""
        t = self._checked(t, x0)
        return self.at("signal_rate", t, x0) * x0 + self.at("noise_rate", t, x0) * eps

    def q_step(self, x_prev: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps, one Markov step q(x_t | x_{t-1}) (DDPM, eq. 2)."""
        t = self._checked(t, x_prev)
        return self.at("sqrt_alpha", t, x_prev) * x_prev + self.at("sqrt_beta", t, x_prev) * eps

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, both of x_t's shape, of q(x_{t-1} | x_t, x_0) (DDPM, eqs. 6 and 7)."""
        t = self._checked(t, x_t)
        mean = self.at("posterior_x0", t, x_t) * x0 + self.at("posterior_x_t", t, x_t) * x_t
        return mean, self.at("posterior_variance", t, x_t).expand_as(mean)

    # What the network says.

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should have answered at x_t = q_sample(x0, t, eps)."""
        t = self._checked(t, x0)
        if self.predict == "eps":
            return eps
        if self.predict == "x0":
            return x0
        return self.at("signal_rate", t, x0) * eps - self.at("noise_rate", t, x0) * x0

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The x0 that the network's output stands for. The output is cast to x_t's dtype first."""
        t = self._checked(t, x_t)
        output = output.to(x_t.dtype)
        if self.predict == "x0":
            return output
        signal, noise = self.at("signal_rate", t, x_t), self.at("noise_rate", t, x_t)
        if self.predict == "eps":
            return (x_t - noise * output) / signal
        return signal * x_t - noise * output

    def predict_eps(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The eps that the network's output stands for. The output is cast to x_t's dtype first."""
        t = self._checked(t, x_t)
        output = output.to(x_t.dtype)
        if self.predict == "eps":
            return output
        signal, noise = self.at("signal_rate", t, x_t), self.at("noise_rate", t, x_t)
        if self.predict == "x0":
            return (x_t - signal * output) / noise
        return noise * x_t + signal * output

    def reverse(self, x_t: Tensor, t: Tensor, output: Tensor, clip_x0: bool) -> Reverse:
        """p(x_{t-1} | x_t): the posterior with the predicted x0 put in for x0 (DDPM, eq. 11)."""
        x0 = self.predict_x0(x_t, t, output)
        if clip_x0:
            x0 = x0.clamp(-1, 1)
        mean, _ = self.posterior(x0, x_t, t)
        return Reverse(mean, self.at("model_variance", t, x_t).expand_as(mean), x0)

    def call(self, model: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """model(x_t, timestep): the network is given the original timestep less one, int64 [N]."""
        t = self._checked(t, x_t)
        return model(x_t, self._tables_on(t.device)["network_timestep"][t - 1].expand(len(x_t)))

    def loss(
        self,
        model: Network,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        weighting: "losses.Weighting" = losses.uniform,
    ) -> Tensor:
        """Weighted squared error of the network's output, the mean over C, H, W: float32 [N] (DDPM, eq. 14).

        `weighting` is a function of (process, t) that gives [N] weights.
        """
        output = self.call(model, self.q_sample(x0, t, eps), t)
        error = output.float() - self.target(x0, t, eps).float()
        return error.square().flatten(1).mean(1) * weighting(self, t).to(error)

    # Coefficients.

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The named coefficient at t, cast to the dtype of `like` and shaped [N, 1, ...] to multiply it.

        Names: signal_rate, noise_rate, sqrt_alpha, sqrt_beta, posterior_x0 and posterior_x_t (the factors of x0
        and x_t in the posterior's mean), posterior_variance, model_variance.
        """
        values = self._tables_on(t.device)[name][t - 1].to(like.dtype)
        return values.view(-1, *[1] * (like.ndim - 1))

    def _tables_on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._tables:
            self._tables[device] = {k: v.to(device) for k, v in self._tables[torch.device("cpu")].items()}
        return self._tables[device]

    def _checked(self, t: Tensor, images: Tensor) -> Tensor:
        """t on the images' device, [N] or [1]; ValueError where it is no timestep of each image."""
        if t.is_floating_point() or t.dtype == torch.bool or t.numel() not in (1, len(images)) or t.ndim > 1:
            raise ValueError(
                f"t must be an integer tensor with one timestep an image, [{len(images)}], "
                f"not {t.dtype} {list(t.shape)}"
            )
        low, high = (int(bound) for bound in t.aminmax())
        if low < 1 or high > self.timesteps:  # 0 would silently read the table's other end
            raise ValueError(f"t must lie in 1..{self.timesteps}, not in {low}..{high}")
        return t.reshape(-1).to(images.device)


def _tables(schedule: NoiseSchedule, variance: str) -> dict[str, Tensor]:
    alpha, alpha_bar, alpha_bar_prev = schedule.alpha, schedule.alpha_bar, schedule.alpha_bar_prev
    posterior_variance = schedule.posterior_variance
    model_variance = posterior_variance.clone() if variance == "small" else schedule.beta
    # DDPM's code does the same for both choices. With T = 1 there is no t = 2 to borrow from.
    model_variance[0] = posterior_variance[1] if schedule.timesteps > 1 else schedule.beta[0]
    return {
        "signal_rate": schedule.signal_rate,
        "noise_rate": schedule.noise_rate,
        "sqrt_alpha": alpha.sqrt(),
        "sqrt_beta": schedule.beta.sqrt(),
        "posterior_x0": alpha_bar_prev.sqrt() * schedule.beta / (1 - alpha_bar),
        "posterior_x_t": alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
        "posterior_variance": posterior_variance,
        "model_variance": model_variance,
        "network_timestep": schedule.original_timesteps - 1,
    }


@contextmanager
def evaluating(model: Network) -> Iterator[None]:
    """Inference mode, with the model (if it is a module) in eval mode; every submodule's mode is put back."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training
