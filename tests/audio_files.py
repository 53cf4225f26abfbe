"""Audio files of every format, for the tests that read them."""

import av
import numpy as np
import soundfile


def write(path, samples, rate=44_100, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".m4a", ".aac"):
        write_with_ffmpeg(path, samples, rate)
    elif path.suffix == ".opus":
        soundfile.write(path, samples, rate, format="OGG", subtype="OPUS")
    else:
        soundfile.write(path, samples, rate, **options)
    return path


def write_with_ffmpeg(path, samples, rate, codec_options=None, **options):
    file_format, codec = {".m4a": ("mp4", "aac"), ".aac": ("adts", "aac"), ".mp3": ("mp3", "libmp3lame")}[path.suffix]
    with av.open(str(path), "w", format=file_format, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo", options=codec_options or {})
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout="stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
