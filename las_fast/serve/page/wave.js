// The waveform, with the words below it and a line at the time of the audio. Only the visible part is drawn.

const PIXELS_PER_SECOND = 180;
const LABEL_HEIGHT = 26; // pixels for the words below the waveform

export class Wave {
  // A click calls onWord(word) on a word, and onSeek(seconds) between words.
  constructor(container, { onWord, onSeek }) {
    this.container = container;
    this.spacer = container.firstElementChild;
    this.canvas = container.querySelector("canvas");
    Object.assign(this, { onWord, onSeek, words: [], samples: null, rate: 1, duration: 0, time: 0, isScheduled: false });
    container.addEventListener("scroll", () => this.draw());
    this.canvas.addEventListener("click", (event) => this.click(event));
    new ResizeObserver(() => this.layout()).observe(container);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // Show another recording. samples: Float32Array, or null if the browser cannot decode it; duration in seconds.
  set(samples, rate, duration) {
    Object.assign(this, { samples, rate, duration, words: [], time: 0 });
    this.container.scrollLeft = 0;
    this.layout();
  }

  addWords(words) {
    this.words.push(...words);
    if (!this.samples && words.length) this.duration = Math.max(this.duration, words.at(-1).end);
    this.layout();
  }

  // Move the line to the time of the audio; with follow, keep it in view.
  setTime(time, follow) {
    this.time = time;
    const x = time * this.scale;
    const left = this.container.scrollLeft;
    if (follow && (x < left || x > left + this.container.clientWidth * 0.9)) this.container.scrollLeft = x - 40;
    this.draw();
  }

  // Pixels per second.
  get scale() {
    return Math.max(PIXELS_PER_SECOND, this.container.clientWidth / (this.duration || 1));
  }

  layout() {
    this.spacer.style.width = `${Math.ceil(this.duration * this.scale)}px`;
    this.canvas.style.width = `${this.container.clientWidth}px`;
    this.draw();
  }

  click(event) {
    const time = (this.container.scrollLeft + event.offsetX) / this.scale;
    const word = this.words.find((one) => one.start <= time && time <= one.end);
    if (word) this.onWord(word);
    else this.onSeek(time);
  }

  draw() {
    if (this.isScheduled) return;
    this.isScheduled = true;
    requestAnimationFrame(() => {
      this.isScheduled = false;
      this.paint();
    });
  }

  paint() {
    const ratio = devicePixelRatio;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const left = this.container.scrollLeft;
    this.paintWords(pen, colour, left, width, height);
    this.paintSamples(pen, colour("wave"), left, width, height - LABEL_HEIGHT);
    pen.fillStyle = colour("accent");
    pen.fillRect(this.time * this.scale - left, 0, 2, height);
  }

  paintWords(pen, colour, left, width, height) {
    pen.font = "12px system-ui, sans-serif";
    for (const word of this.words) {
      const [from, to] = [word.start * this.scale - left, word.end * this.scale - left];
      if (to < 0 || from > width) continue;
      pen.globalAlpha = 0.12 + 0.48 * doubt(word);
      pen.fillStyle = colour(word.confidence === null ? "wave" : "doubt");
      pen.fillRect(from + 0.5, 0, Math.max(1, to - from - 1), height - LABEL_HEIGHT);
      pen.globalAlpha = 1;
      pen.fillStyle = colour("ink");
      pen.save();
      pen.beginPath();
      pen.rect(from, height - LABEL_HEIGHT, Math.max(to - from, 8), LABEL_HEIGHT);
      pen.clip();
      pen.fillText(word.word, from + 1, height - 8);
      pen.restore();
    }
  }

  paintSamples(pen, colour, left, width, height) {
    if (!this.samples) return;
    pen.fillStyle = colour;
    const step = this.rate / this.scale;
    for (let x = 0; x < width; x++) {
      const [first, last] = [Math.floor((left + x) * step), Math.floor((left + x + 1) * step)];
      let [low, high] = [0, 0];
      for (let i = first; i < Math.min(last, this.samples.length); i++) {
        low = Math.min(low, this.samples[i]);
        high = Math.max(high, this.samples[i]);
      }
      const [top, bottom] = [heightOf(high), heightOf(-low)].map((y) => (y * height) / 2);
      pen.fillRect(x, height / 2 - top, 1, Math.max(1, top + bottom));
    }
  }
}

// The share of the colour for low confidence in a word's colour, 0 to 1.
export function doubt(word) {
  return word.confidence === null ? 0 : Math.min(1, Math.max(0, (1 - word.confidence) * 1.4));
}

// The height of a sample, 0 to 1; the square root makes quiet speech visible.
function heightOf(level) {
  return Math.min(1, Math.sqrt(Math.max(0, level)));
}
