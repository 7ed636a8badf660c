"""Where boxes will be: a constant-velocity Kalman filter for all tracks at once.

State of a track: centre x, centre y, aspect ratio w / h and height, each with its velocity. All matrices of this
model couple a quantity with its own velocity only, so that the 8 x 8 filter falls apart into four of 2 x 2, which are
exact and are updated here in closed form for all tracks. Noise as in DeepSORT and ByteTrack: 1/20 of the height for
positions, 1/160 for velocities; constants for the aspect ratio.
"""

from __future__ import annotations

import numpy as np

POSITION_STD, VELOCITY_STD = 1 / 20, 1 / 160  # as shares of the height
ASPECT_STD, ASPECT_VELOCITY_STD, ASPECT_NOISE_STD = 1e-2, 1e-5, 1e-1


class KalmanBank:
    """The filters of all tracks, row by row as in the memory.

    Attributes:
        mean: N x 4 x 2 float64, value and velocity (a frame) of centre x, centre y, aspect ratio, height.
        covariance: N x 4 x 3 float64, variance of the value, covariance, variance of the velocity.
    """

    def __init__(self) -> None:
        self.mean = np.zeros((0, 4, 2))
        self.covariance = np.zeros((0, 4, 3))

    def append(self, boxes: np.ndarray) -> None:
        """Start filters at boxes (N x 4), at rest."""
        measured = to_measurement(boxes)
        scale = measured[:, 3:4]
        position = np.repeat(2 * POSITION_STD * scale, 4, axis=1)
        velocity = np.repeat(10 * VELOCITY_STD * scale, 4, axis=1)
        position[:, 2], velocity[:, 2] = ASPECT_STD, ASPECT_VELOCITY_STD
        mean = np.stack((measured, np.zeros_like(measured)), axis=-1)
        covariance = np.stack((position**2, np.zeros_like(position), velocity**2), axis=-1)
        self.mean = np.concatenate((self.mean, mean))
        self.covariance = np.concatenate((self.covariance, covariance))

    def keep(self, which: np.ndarray) -> None:
        """Forget all filters but those that a boolean mask picks."""
        if not which.all():
            self.mean, self.covariance = self.mean[which], self.covariance[which]

    def predict(self, frames: int = 1) -> None:
        """Move all filters on by a number of frames."""
        for _ in range(frames):
            height = self.mean[:, 3:4, 0]
            position = np.repeat(POSITION_STD * height, 4, axis=1)
            velocity = np.repeat(VELOCITY_STD * height, 4, axis=1)
            position[:, 2], velocity[:, 2] = ASPECT_STD, ASPECT_VELOCITY_STD
            self.mean[:, :, 0] += self.mean[:, :, 1]
            value, both, speed = (self.covariance[:, :, part] for part in range(3))
            self.covariance = np.stack(
                (value + 2 * both + speed + position**2, both + speed, speed + velocity**2), axis=-1
            )

    def update(self, rows: np.ndarray, boxes: np.ndarray) -> None:
        """Correct some filters (K different rows) by measured boxes (K x 4)."""
        measured = to_measurement(boxes)
        mean, covariance = self.mean[rows], self.covariance[rows]
        noise = np.repeat(POSITION_STD * mean[:, 3:4, 0], 4, axis=1)
        noise[:, 2] = ASPECT_NOISE_STD
        value, both, speed = (covariance[:, :, part] for part in range(3))
        total = value + noise**2
        gain, gain_velocity = value / total, both / total
        surprise = measured - mean[:, :, 0]
        self.mean[rows] = mean + np.stack((gain * surprise, gain_velocity * surprise), axis=-1)
        self.covariance[rows] = np.stack(
            (value - gain * value, both - gain * both, speed - gain_velocity * both), axis=-1
        )

    def boxes(self) -> np.ndarray:
        """Where the filters put their tracks now, N x 4 float32."""
        centre, height = self.mean[:, :2, 0], self.mean[:, 3, 0].clip(1e-3)
        width = self.mean[:, 2, 0].clip(1e-3) * height
        half = np.stack((width, height), axis=1) / 2
        return np.concatenate((centre - half, centre + half), axis=1).astype(np.float32)


def to_measurement(boxes: np.ndarray) -> np.ndarray:
    """Boxes (N x 4) as centre x, centre y, width / height, height, float64."""
    boxes = np.asarray(boxes, np.float64)
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.stack((centre[:, 0], centre[:, 1], size[:, 0] / size[:, 1], size[:, 1]), axis=1)
