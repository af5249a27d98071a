"""The web page in Debian's Chromium, with a real upload and a fake microphone; run by `make browser-test`.

The name keeps it out of the default run, which needs no browser. Screenshots are written to pytest's --basetemp.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import las_fast
from serve.services import running

SPOKEN = {"YES", "KNOW", "THAT", "SAID", "SIMPLY", "STAND", "WAS", "WRONG", "DIDN'T", "ONLY", "TELL", "NOW"}
TALK = ("4446-2275-0030", "4446-2275-0031", "4446-2275-0032")
SIZES = {"desktop": (1000, 1300, False), "phone": (390, 844, True)}  # width, height, is mobile


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A WAV file with three utterances and pauses between them."""
    folder = Path(__file__).parents[2] / ".." / "shared" / "speech" / "audio" / "librispeech-test-clean" / "4446"
    sounds = [soundfile.read(folder / f"{one}.ogg", dtype="float32")[0] for one in TALK]
    pause = np.zeros(24000, np.float32)
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(path, np.concatenate([sounds[0], pause, sounds[1], pause, sounds[2]]), 16000)
    return path


@pytest.fixture(scope="module")
def service():
    with running(las_fast.load("english", device="cpu"), name="english", nbest=3) as one:
        yield one


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(talk, downloads):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--use-fake-ui-for-media-stream",
                 "--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={talk}",
                 "--autoplay-policy=no-user-gesture-required", "--window-size=1100,1000"):  # fmt: skip
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium, service):
    """The page, freshly loaded; at the end nothing may have been logged as an error."""
    chromium.get(service.url)
    chromium.get_log("browser")
    yield chromium
    assert [row for row in chromium.get_log("browser") if row["level"] == "SEVERE"] == []


def encode(path, samples, codec, rate):
    """Write samples (N,) to a file with FFmpeg."""
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=track.format.name, layout="mono", rate=rate, frame_size=1024)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(track.encode(part))
        container.mux(track.encode(None))


def one(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector)


def wait(page, condition, seconds=60):
    return WebDriverWait(page, seconds, 0.1).until(condition)


def upload(page, path):
    one(page, "#file").send_keys(str(path))
    wait(page, lambda page: one(page, "#status").text.startswith("Done") or one(page, "#error").is_displayed())


@pytest.fixture
def transcribed(page, talk):
    upload(page, talk)
    assert not one(page, "#error").is_displayed(), one(page, "#error").text
    return page


def test_an_upload_shows_the_text_of_the_python_api(transcribed, service, talk):
    texts = ["".join(f"{word.text} " for word in row.find_elements(By.CSS_SELECTOR, ".word")).strip()
             for row in transcribed.find_elements(By.CSS_SELECTOR, "#segments > li")]  # fmt: skip
    assert texts == [segment.text for segment in service.service.model.transcribe(talk).segments]
    assert "model english" in one(transcribed, "#model").text


def test_a_click_on_a_word_plays_it(transcribed):
    words = transcribed.find_elements(By.CSS_SELECTOR, "button.word")
    words[-1].click()
    start = transcribed.execute_script("return document.getElementById('audio').currentTime")
    assert start > 8
    wait(transcribed, lambda page: page.execute_script("return document.getElementById('audio').paused"), 10)
    assert transcribed.execute_script("return document.getElementById('audio').currentTime") > start + 0.1


def test_a_click_on_the_waveform_moves_the_audio(transcribed):
    script = """
        const canvas = document.querySelector('#wave canvas'), box = canvas.getBoundingClientRect();
        canvas.dispatchEvent(new MouseEvent('click', {clientX: box.left + 540, clientY: box.top + 20, bubbles: true}));
        return document.getElementById('audio').currentTime"""
    assert transcribed.execute_script(script) == pytest.approx(3.0, abs=0.6)
    painted = """
        const canvas = document.querySelector('#wave canvas');
        return canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((x) => x)"""
    assert transcribed.execute_script(painted)


def test_the_keyboard_reaches_and_plays_every_word(transcribed):
    words = transcribed.find_elements(By.CSS_SELECTOR, "button.word")
    reachable = [word for word in words if word.get_attribute("tabindex") == "0"]
    assert len(reachable) == 1  # one stop for Tab; arrow keys do the rest
    transcribed.execute_script("arguments[0].focus()", reachable[0])
    for n in range(1, len(words)):
        transcribed.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        assert transcribed.switch_to.active_element == words[n]
    transcribed.switch_to.active_element.send_keys(Keys.ENTER)
    assert transcribed.execute_script("return document.getElementById('audio').currentTime") > 8


def test_everything_has_a_name_for_screen_readers(transcribed):
    controls = transcribed.find_elements(By.CSS_SELECTOR, "button, input, summary, #wave, section")
    assert len(controls) > 10
    assert [c.get_attribute("outerHTML") for c in controls if c.is_displayed() and not c.accessible_name] == []
    assert one(transcribed, "#status").aria_role == "status"


def test_other_texts_and_the_attention_are_shown(transcribed):
    # The search drops the other hypotheses of a segment that is easy.
    boxes = transcribed.find_elements(By.CSS_SELECTOR, "#segments details")
    box = next(box for box in boxes if box.find_elements(By.TAG_NAME, "li"))
    box.find_element(By.TAG_NAME, "summary").click()
    canvas = wait(transcribed, lambda page: box.find_element(By.CSS_SELECTOR, "figure canvas"))
    assert canvas.accessible_name.startswith("Attention of")
    assert len(box.find_elements(By.TAG_NAME, "li")) <= 2 and box.find_elements(By.TAG_NAME, "mark")


def test_problems_of_a_recording_are_shown(page, talk, tmp_path):
    whole = talk.read_bytes()
    (tmp_path / "half.wav").write_bytes(whole[: len(whole) // 2])
    upload(page, tmp_path / "half.wav")
    done, warning = one(page, "#status").text.splitlines()
    assert done.startswith("Done: ") and warning.startswith("Warning: the file is cut off: it has ")


def test_a_recording_without_speech_is_a_warning(page, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000, np.float32), 16000)
    one(page, "#file").send_keys(str(tmp_path / "silence.wav"))
    wait(page, lambda page: one(page, "#status").text.startswith("Warning: the file: no speech was found in its 1.00"))


def test_an_m4a_is_sent_as_it_is_to_a_service_with_pyav(page, talk, tmp_path):
    samples, rate = soundfile.read(talk, dtype="float32")
    encode(tmp_path / "talk.m4a", samples, "aac", rate)
    wait(page, lambda page: "english" in one(page, "#model").text)
    page.execute_script("""
        const send = window.fetch;
        window.fetch = (url, options) => (window.sent = options.body.get("file").name, send(url, options))""")
    upload(page, tmp_path / "talk.m4a")
    assert page.execute_script("return window.sent") == "talk.m4a" and one(page, "#status").text.startswith("Done")


def test_subtitles_are_downloaded(transcribed, downloads):
    for suffix in ("srt", "json"):
        one(transcribed, f"[data-suffix={suffix}]").click()
        file = downloads / f"talk.{suffix}"
        wait(transcribed, lambda page, file=file: file.exists(), 10)
    assert "-->" in (downloads / "talk.srt").read_text()
    assert len(json.loads((downloads / "talk.json").read_text())["segments"]) == 3


def test_the_microphone_is_transcribed(page):
    one(page, "#record").click()
    wait(page, lambda page: one(page, "#status").text.startswith("Recording: 0:06"))
    assert one(page, "#record").get_attribute("aria-pressed") == "true"
    one(page, "#record").click()
    wait(page, lambda page: one(page, "#status").text.startswith("Done"))
    words = {word.text for word in page.find_elements(By.CSS_SELECTOR, "button.word")}
    assert len(words & SPOKEN) >= 2


def test_a_file_that_is_not_audio_shows_the_error(page, tmp_path):
    (tmp_path / "x.wav").write_text("not audio")
    upload(page, tmp_path / "x.wav")
    assert "cannot be read as audio" in one(page, "#error").text and one(page, "#error").aria_role == "alert"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_its_window(page, talk, scheme, size, tmp_path_factory):
    width, height, mobile = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    try:
        upload(page, talk)
        one(page, "#segments details summary").click()
        wait(page, lambda page: page.find_elements(By.CSS_SELECTOR, "figure canvas"))
        time.sleep(0.3)  # the waveform is painted with the next frame
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        page.save_screenshot(tmp_path_factory.getbasetemp() / f"{size}-{scheme}.png")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
