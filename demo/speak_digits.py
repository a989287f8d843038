"""Job 2 of the demo: the ten digits in three voices, generated sample by sample, and what a classifier heard."""

import audiomamba
from audiomamba.data.waveforms import Waveform
from audiomamba.data.writing import encoded
from audiomamba.models.clip_classifier import load_clip_classifier, opinions
from mambapipelines.pages.clips import clip_picture
from mambapipelines.pages.html import Item, Player, Section, Table

MODEL, CLASSIFIER = "shipped://digits", "shipped://digits-classifier"
VOICES = ("jackson", "nicolas", "george")
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SECONDS, SEED = 1.0, 0


def speak_digits() -> Section:
    """Players with spectrograms, the real-time factor, and a table of what was heard."""
    voice = audiomamba.load(MODEL)
    rate = voice.quantiser.sample_rate_hz
    classifier = load_clip_classifier(CLASSIFIER)[0]
    players: list[Item] = []
    rows, samples_made, seconds, correct = [], 0, 0.0, 0
    for speaker in VOICES:
        labels = {"digit": "each", "speaker": speaker}
        settings = voice.settings(labels=labels)
        made = voice.generate(len(DIGIT_NAMES), SECONDS, SEED, labels=labels)
        samples_made += made.log_likelihoods.numel()
        seconds += made.seconds_taken
        clips = [classifier.fitted(Waveform(samples, rate)) for samples in made.samples]
        best = opinions(classifier, clips).probabilities.argmax(axis=1)
        heard = [classifier.config.class_names[int(place)] for place in best]
        rows.append([speaker, *heard])
        correct += sum(int(one) == digit for digit, one in enumerate(heard))
        for digit, samples in enumerate(made.samples):
            caption = f"{DIGIT_NAMES[digit]}, {speaker}; heard as {heard[digit]}"
            players.append(Player(encoded(samples, rate), caption, png=clip_picture(samples, rate)))
    factor = samples_made / max(seconds, 1e-9) / rate
    count = len(VOICES) * len(DIGIT_NAMES)
    chosen = ", which also chose among the candidates," if settings.judge == CLASSIFIER else ""
    content: list[Item] = [
        f"{count} clips of {SECONDS:g} s at {rate:,} Hz from the shipped model `digits`, one sample after the other, "
        f"{len(DIGIT_NAMES)} clips side by side: {seconds:.1f} s of work, {factor:.2f} times real time. Settings, "
        f"as the model suggests: {settings}, seed {SEED}. No clip was chosen by hand or left out.",
        f"The shipped `digits-classifier`{chosen} heard the digit that was asked for in {correct} of {count} clips "
        f"({correct / count:.0%}; chance is 10 %):",
        Table(["asked for", *DIGIT_NAMES], rows),
        *players,
    ]
    content.append(
        f"Like these: audiomamba generate digits --label digit=each --label speaker={VOICES[0]} "
        f"--clips {len(DIGIT_NAMES)} --seconds {SECONDS:g} -o digits"
    )
    return Section("Generate: ten digits in three voices", content)
