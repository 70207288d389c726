"""Active speaker: whether the face of a clip seems to speak the voice that is heard, by Light-ASD."""

from pathlib import Path

from keysync_jax.media.face_track import face_boxes
from keysync_jax.metrics.meter import Found, Moment, Start, Subject, Unavailable
from keysync_jax.pipeline.active_speaker import SpeakerNetwork, SpeakerTrack


class _Meter:
    def __init__(self, network: SpeakerNetwork, subject: Subject) -> None:
        assert subject.voice is not None  # `Metric.needs` says so.
        assert subject.landmarks is not None
        self._track = SpeakerTrack(network, face_boxes(subject.landmarks), subject.voice)

    def update(self, moment: Moment) -> None:
        self._track.update(moment.frame)

    def result(self) -> Found:
        try:
            found = self._track.result()
        except ValueError as error:
            return dict.fromkeys(("active_speaker", "speaking_share"), Unavailable(str(error)))
        return {"active_speaker": float(found.probability.mean()), "speaking_share": found.share}


def open_speaking(weights: Path) -> Start:
    """Light-ASD's metrics."""
    network = SpeakerNetwork.load(weights / "light_asd.safetensors")
    return lambda subject: _Meter(network, subject)
