// The waveform: the samples, the words at their times, and where the audio is. Only the visible part is drawn.

const PIXELS_PER_SECOND = 180;
const LABELS = 26; // pixels for the words below the waveform

export class Wave {
  // onWord(word) and onSeek(seconds) are called for clicks.
  constructor(container, { onWord, onSeek }) {
    this.container = container;
    this.spacer = container.firstElementChild;
    this.canvas = container.querySelector("canvas");
    Object.assign(this, { onWord, onSeek, words: [], samples: null, rate: 1, duration: 0, time: 0, asked: false });
    container.addEventListener("scroll", () => this.draw());
    this.canvas.addEventListener("click", (event) => this.click(event));
    new ResizeObserver(() => this.layout()).observe(container);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // samples: Float32Array, or null if the browser cannot decode the recording.
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

  // Move the line that shows where the audio is, and keep it in view.
  setTime(time, follow) {
    this.time = time;
    const x = time * this.scale;
    const left = this.container.scrollLeft;
    if (follow && (x < left || x > left + this.container.clientWidth * 0.9)) this.container.scrollLeft = x - 40;
    this.draw();
  }

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
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => {
      this.asked = false;
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
    this.paintSamples(pen, colour("wave"), left, width, height - LABELS);
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
      pen.fillRect(from + 0.5, 0, Math.max(1, to - from - 1), height - LABELS);
      pen.globalAlpha = 1;
      pen.fillStyle = colour("ink");
      pen.save();
      pen.beginPath();
      pen.rect(from, height - LABELS, Math.max(to - from, 8), LABELS);
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
      const [top, bottom] = [shape(high), shape(-low)].map((y) => (y * height) / 2);
      pen.fillRect(x, height / 2 - top, 1, Math.max(1, top + bottom));
    }
  }
}

// How much of the colour for low confidence a word gets, 0 to 1.
export function doubt(word) {
  return word.confidence === null ? 0 : Math.min(1, Math.max(0, (1 - word.confidence) * 1.4));
}

// Quiet speech must be visible too.
function shape(level) {
  return Math.min(1, Math.sqrt(Math.max(0, level)));
}
