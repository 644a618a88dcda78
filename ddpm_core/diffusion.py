"""The diffusion process: forward, posterior, what the network predicts, and the training loss.

Notation of Ho et al. 2020 (DDPM). Images are float tensors [N, C, H, W] in [-1, 1] (the formulas hold for any
shape [N, ...]); t is an integer tensor [N] in 1..T. Coefficients are tabled in float64, gathered by t and cast to
the images' dtype, but to float32 for images in half precision, which are reckoned with in float32 and rounded once.

Integer images, shapes that do not fit, timesteps outside 1..T and images or noise that are not finite are ValueErrors.
Only the network's output may hold NaN, and hands it on: a training that diverges is to be seen in its loss.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_core import losses
from ddpm_core.checks import check_finite, check_images, check_same_shape, checked_timesteps
from ddpm_core.schedule import NoiseSchedule

Network = Callable[[Tensor, Tensor], Tensor]

PREDICTIONS = ("eps", "x0", "v", "mean")
VARIANCES = ("small", "large", "learned_range")


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) as the model has it: mean and variance, each [N, C, H, W], and the x0 behind the mean."""

    mean: Tensor
    variance: Tensor
    x0: Tensor


class GaussianDiffusion:
    """A noise schedule together with what the network predicts and the variance of the reverse steps.

    predict: "eps" (the noise), "x0" (the image), "v" = signal_rate eps - noise_rate x0 (Salimans and Ho 2022,
    "Progressive distillation", appendix D), or "mean", that of p(x_{t-1} | x_t) (DDPM, section 3.2: the baseline).
    variance: that of p(x_{t-1} | x_t): "small", the posterior's beta_tilde_t, or "large", beta_t (DDPM, section
    3.2). At t = 1, where beta_tilde is 0, either is beta_tilde_2: it serves the decoder's likelihood alone, for
    sampling adds no noise there. "learned_range": the network has 2 C channels, the second C of which, v, choose
    between the two on a logarithmic scale, log variance = (1 + v)/2 log beta_t + (1 - v)/2 log beta_tilde_t
    (Nichol and Dhariwal 2021, "Improved DDPM", eq. 15; v is not confined to -1..1, as there).

    Any prediction goes with "small" and "large"; "learned_range" with all but "mean". ValueError for other
    combinations, and for "eps" on a schedule with zero terminal signal; with "eps" and "mean", x0 cannot be read in
    float32 where that holds no signal (alpha_bar below 1e-89 or so), which is a ValueError at such t.
    """

    def __init__(self, schedule: NoiseSchedule, predict: str = "eps", variance: str = "small") -> None:
        if predict not in PREDICTIONS:
            raise ValueError(f"predict must be one of {', '.join(PREDICTIONS)}, not {predict!r}")
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, not {variance!r}")
        if predict == "mean" and variance == "learned_range":
            raise ValueError("predict mean goes with variance small or large, not with learned_range")
        if predict == "eps" and schedule.alpha_bar[-1] == 0:
            raise ValueError("eps says nothing about x0 where no signal is left: predict v or x0 on this schedule")
        self.schedule = schedule
        self.predict = predict
        self.variance = variance
        tables = _tables(schedule)
        self._tables = {torch.device("cpu"): tables}
        self._divisor = {"eps": "signal_rate", "mean": "mean_x0"}.get(predict)  # of x0, see predict_x0
        self.needs_float64 = self._divisor is not None and not bool(tables[self._divisor].float().all())
        """Whether there are timesteps at which x0 cannot be read in float32."""

    @property
    def timesteps(self) -> int:
        """T."""
        return self.schedule.timesteps

    def respace(self, steps: int, spacing: str = "trailing") -> "GaussianDiffusion":
        """The same process on `steps` of the timesteps (`NoiseSchedule.respace`)."""
        return GaussianDiffusion(self.schedule.respace(steps, spacing), self.predict, self.variance)

    # Forward.

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, a draw of q(x_t | x_0) (DDPM, eq. 4)."""
        return self._noised("signal_rate", x0, "noise_rate", t, eps)

    def q_step(self, x_prev: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps, one Markov step q(x_t | x_{t-1}) (DDPM, eq. 2)."""
        return self._noised("sqrt_alpha", x_prev, "sqrt_beta", t, eps)

    def _noised(self, signal: str, images: Tensor, noise: str, t: Tensor, eps: Tensor) -> Tensor:
        t = self._checked(t, images)
        check_same_shape(images, eps)
        x, eps_wide = _wide(images), _wide(eps)
        x_t = self._at(signal, t, x) * x + self._at(noise, t, x) * eps_wide
        check_finite(x_t)
        return x_t.to(torch.promote_types(images.dtype, eps.dtype))

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, both of x_t's shape, of q(x_{t-1} | x_t, x_0) (DDPM, eqs. 6 and 7): float32 at least."""
        t = self._checked(t, x_t)
        check_images(x0)
        check_same_shape(x_t, x0)
        check_finite(x0)
        check_finite(x_t)
        return self._posterior(x0, x_t, t)

    def _posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`posterior` of what is checked, but for an x0 that the network answered."""
        x0, x_t = _wide(x0), _wide(x_t)
        mean = self._at("posterior_x0", t, x_t) * x0 + self._at("posterior_x_t", t, x_t) * x_t
        return mean, self._at("posterior_variance", t, x_t).expand_as(mean)

    # What the network says. It may compute in half precision; what its output stands for is reckoned in float32 at
    # least, for near T an error of the mean comes back thousands of times larger in x0.

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should have answered at x_t = q_sample(x0, t, eps), float32 at least."""
        t, x, eps_wide = self._checked(t, x0), _wide(x0), _wide(eps)
        check_same_shape(x, eps_wide)
        if self.predict == "eps":
            return eps_wide
        if self.predict == "x0":
            return x
        if self.predict == "mean":
            x_t = self.q_sample(x0, t, eps)
            return self._at("mean_x0", t, x) * x + self._at("mean_x_t", t, x) * _wide(x_t)
        return self._at("signal_rate", t, x) * eps_wide - self._at("noise_rate", t, x) * x

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The x0 that the network's output stands for."""
        t, x_t, output = self._heard(x_t, t, output)
        if self.predict == "x0":
            return output
        if self.needs_float64 and self._divisor and not self._at(self._divisor, t, x_t).all():
            raise ValueError(
                f"{self.predict} on {self.schedule} says nothing about x0 in {x_t.dtype}, which cannot hold so little "
                "signal: use float64, predict v or x0, or end the schedule earlier"
            )
        if self.predict == "mean":
            return (output - self._at("mean_x_t", t, x_t) * x_t) / self._at("mean_x0", t, x_t)
        signal, noise = self._at("signal_rate", t, x_t), self._at("noise_rate", t, x_t)
        if self.predict == "eps":
            return (x_t - noise * output) / signal
        return signal * x_t - noise * output

    def predict_eps(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The eps that the network's output stands for."""
        t, x_t, output = self._heard(x_t, t, output)
        if self.predict == "eps":
            return output
        signal, noise = self._at("signal_rate", t, x_t), self._at("noise_rate", t, x_t)
        if self.predict == "v":
            return noise * x_t + signal * output
        return (x_t - signal * self.predict_x0(x_t, t, output)) / noise

    def predict_v(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The v that the network's output stands for."""
        t, x_t, output = self._heard(x_t, t, output)
        if self.predict == "v":
            return output
        signal, noise = self._at("signal_rate", t, x_t), self._at("noise_rate", t, x_t)
        return signal * self.predict_eps(x_t, t, output) - noise * self.predict_x0(x_t, t, output)

    def predict_mean(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The mean of p(x_{t-1} | x_t) that the network's output stands for (DDPM, eq. 11)."""
        t, x_t, output = self._heard(x_t, t, output)
        if self.predict == "mean" and self.schedule.original is self.schedule:
            return output
        # In fewer steps, the network's mean is that of the step it was trained on, which is shorter.
        return self._posterior(self.predict_x0(x_t, t, output), x_t, t)[0]

    def predict_variance(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The variance of p(x_{t-1} | x_t), of x_t's shape; the network has a say for "learned_range" alone."""
        t = self._checked(t, x_t)
        if self.variance != "learned_range":
            return self._at(f"{self.variance}_variance", t, _wide(x_t)).expand_as(x_t)
        choice = self.halves(x_t, output)[1]
        if choice is None:
            raise ValueError("a learned variance is in the second half of the output's channels, which is missing")
        share = (choice.to(_wide(x_t).dtype) + 1) / 2
        low, high = self._at("log_small_variance", t, share), self._at("log_beta", t, share)
        return (share * high + (1 - share) * low).exp()

    def reverse(self, x_t: Tensor, t: Tensor, output: Tensor, clip_x0: bool) -> Reverse:
        """p(x_{t-1} | x_t): the posterior with the predicted x0 put in for x0 (DDPM, eq. 11)."""
        t, x_t = self._checked(t, x_t), _wide(x_t)
        x0 = self.predict_x0(x_t, t, output)
        variance = self.predict_variance(x_t, t, output)
        if clip_x0:
            x0 = x0.clamp(-1, 1)
            return Reverse(self._posterior(x0, x_t, t)[0], variance, x0)
        return Reverse(self.predict_mean(x_t, t, output), variance, x0)

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

        `weighting` is a function of (process, t) that gives [N] weights. Other losses: `ddpm_core.losses`.
        ValueError for a learned variance, which this loss would leave untrained.
        """
        if self.variance == "learned_range":
            raise ValueError("this loss does not train a learned variance: use losses.hybrid or losses.vlb")
        output = self.call(model, self.q_sample(x0, t, eps), t)
        check_same_shape(x0, output)
        return losses.squared_error(self, output, x0, t, eps, weighting)

    # Coefficients.

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The named coefficient at t, cast to the dtype of `like` and shaped [N, 1, ...] to multiply it.

        Names: signal_rate, noise_rate, sqrt_alpha, sqrt_beta, posterior_x0 and posterior_x_t (the factors of x0
        and x_t in the posterior's mean), mean_x0 and mean_x_t (those of the step that the network was trained on,
        which is shorter on a respaced schedule), posterior_variance, small_variance and large_variance (of the reverse
        step), log_small_variance, log_beta. ValueError for another.
        """
        tables = self._tables[torch.device("cpu")]
        if name not in tables:
            raise ValueError(f"there is no coefficient {name!r}: there are {', '.join(tables)}")
        return self._at(name, self._checked(t, like), like)

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """`at` of a t that is checked."""
        values = self._tables_on(t.device)[name][t - 1].to(like.dtype)
        return values.view(-1, *[1] * (like.ndim - 1))

    def _tables_on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._tables:
            self._tables[device] = {k: v.to(device) for k, v in self._tables[torch.device("cpu")].items()}
        return self._tables[device]

    def _heard(self, x_t: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, x_t, the prediction in the output), wide enough to reckon with."""
        t, prediction = self._checked(t, x_t), self.halves(x_t, output)[0]
        check_finite(x_t)
        x_t = _wide(x_t)
        return t, x_t, prediction.to(x_t.dtype)

    def halves(self, x_t: Tensor, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prediction and, of a learned variance, what chooses it; ValueError for an output of another shape."""
        if output.shape == x_t.shape:  # of a learned variance: a prediction that was taken out before
            return output, None
        if self.variance == "learned_range" and x_t.ndim > 1:
            n, channels, *rest = x_t.shape
            if output.shape == (n, 2 * channels, *rest):
                return output[:, :channels], output[:, channels:]
        raise ValueError(
            f"the network's output for images {list(x_t.shape)} and variance {self.variance} cannot be of shape "
            f"{list(output.shape)}"
        )

    def _checked(self, t: Tensor, images: Tensor) -> Tensor:
        """t on the images' device, int64 [N] or [1]; ValueError where it is no timestep of each image."""
        check_images(images)
        t = checked_timesteps(t, self.timesteps)
        if len(t) not in (1, len(images)):
            raise ValueError(f"t must hold one timestep an image, [{len(images)}], not [{len(t)}]")
        return t.to(images.device)


def _wide(images: Tensor) -> Tensor:
    """The images in float32 at least."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _tables(schedule: NoiseSchedule) -> dict[str, Tensor]:
    small, large = schedule.posterior_variance, schedule.beta
    # DDPM's code does the same for both choices. With T = 1 there is no t = 2 to borrow from.
    small[0] = small[1] if schedule.timesteps > 1 else large[0]
    large[0] = small[0]
    original, at = schedule.original, schedule.original_timesteps - 1
    mean_x0, mean_x_t = (factor[at] for factor in original.posterior_factors)
    posterior_x0, posterior_x_t = schedule.posterior_factors
    return {
        "signal_rate": schedule.signal_rate,
        "noise_rate": schedule.noise_rate,
        "sqrt_alpha": schedule.alpha.sqrt(),
        "sqrt_beta": schedule.beta.sqrt(),
        "posterior_x0": posterior_x0,
        "posterior_x_t": posterior_x_t,
        "mean_x0": mean_x0,
        "mean_x_t": mean_x_t,
        "posterior_variance": schedule.posterior_variance,
        "small_variance": small,
        "large_variance": large,
        "log_small_variance": small.log(),
        "log_beta": schedule.beta.log(),
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
