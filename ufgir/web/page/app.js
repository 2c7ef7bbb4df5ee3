// This module is both the page and its worker; the last lines check where it runs.
//
// The page decodes an image and sends its pixels to the worker in strips. The worker resizes them as Pillow does, runs the model with
// ONNX Runtime Web, and returns the results.

const MOST_BYTES = 100e6; // size of a file
const MOST_PIXELS = 120e6; // pixels of an image, as in `ufgir app`
const LARGE_PIXELS = 24e6; // images above this size are slow to read, so the page shows a message
const STRIP_PIXELS = 1 << 20; // pixels of a strip
const MOST_THREADS = 8;
const TOP_CLASSES = 5;
const RUNS = 5, RUN_SECONDS = 1.5; // runs for the median of the latency, and their maximal duration
const OWN = 0.999; // smallest share of a patch that counts as having its own token
const DARK = 0.15; // brightness of a patch without a token

// ------------------------------------------------------------------------------------------------------ resizing as in Pillow

const FILTERS = { // support in pixels, and weight as a function of the distance
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (x === 0 ? 1 : Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)))],
  bicubic: [2, cubic],
  lanczos: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const BITS = 22; // fractional bits of a weight

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function cubic(x) {
  const a = -0.5, t = Math.abs(x);
  if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
  return t < 2 ? (((t - 5) * t + 8) * t - 4) * a : 0;
}

/** Return for each of `to` pixels the first of the `from` pixels that contribute to it, and their weights in fixed point. */
export function resizeWeights(from, to, name) {
  const [support, weigh] = FILTERS[name], scale = from / to, wide = Math.max(scale, 1), reach = support * wide;
  return Array.from({length: to}, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5)), last = Math.min(from, Math.trunc(centre + reach + 0.5));
    const weights = [];
    for (let x = first; x < last; x++) weights.push(weigh((x - centre + 0.5) / wide));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    const fixed = weights.map((weight) => {
      const share = (sum ? weight / sum : weight) * (1 << BITS);
      return Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    });
    return {first, weights: Int32Array.from(fixed)};
  });
}

function level(sum) {
  const value = sum >> BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/** Resizes an image that arrives in strips: `add` resizes the width of a strip, `finish` the height of the image. */
export class Resizer {
  constructor(width, height, [toHeight, toWidth], filter) {
    Object.assign(this, {width, height, toHeight, toWidth});
    this.columns = width === toWidth ? null : resizeWeights(width, toWidth, filter);
    this.rows = height === toHeight ? null : resizeWeights(height, toHeight, filter);
    this.narrow = new Uint8Array(height * toWidth * 3);
  }

  /** Add rows of RGBA pixels, starting at row `top`. */
  add(rgba, top) {
    const {width, toWidth, columns, narrow} = this, rows = rgba.length / 4 / width;
    for (let y = 0; y < rows; y++) {
      let out = (top + y) * toWidth * 3;
      for (let x = 0; x < toWidth; x++) {
        let at = (y * width + (columns ? columns[x].first : x)) * 4;
        if (!columns) {
          for (let c = 0; c < 3; c++) narrow[out++] = rgba[at + c];
          continue;
        }
        const weights = columns[x].weights;
        let red = 1 << (BITS - 1), green = red, blue = red;
        for (let i = 0; i < weights.length; i++, at += 4) {
          const weight = weights[i];
          red += rgba[at] * weight;
          green += rgba[at + 1] * weight;
          blue += rgba[at + 2] * weight;
        }
        narrow[out++] = level(red);
        narrow[out++] = level(green);
        narrow[out++] = level(blue);
      }
    }
  }

  /** Return the resized levels (height, width, 3), 8 bits each. */
  finish() {
    const {toHeight, toWidth, rows, narrow} = this, stride = toWidth * 3;
    if (!rows) return narrow;
    const done = new Uint8Array(toHeight * stride);
    for (let y = 0; y < toHeight; y++) {
      const {first, weights} = rows[y];
      for (let x = 0; x < stride; x++) {
        let sum = 1 << (BITS - 1);
        for (let i = 0; i < weights.length; i++) sum += narrow[(first + i) * stride + x] * weights[i];
        done[y * stride + x] = level(sum);
      }
    }
    return done;
  }
}

/** Return the center crop of resized levels. */
export function crop(levels, [height, width], [toHeight, toWidth]) {
  const top = Math.floor((height - toHeight) / 2), left = Math.floor((width - toWidth) / 2);
  const done = new Uint8Array(toHeight * toWidth * 3);
  for (let y = 0; y < toHeight; y++) {
    const start = ((top + y) * width + left) * 3;
    done.set(levels.subarray(start, start + toWidth * 3), y * toWidth * 3);
  }
  return done;
}

/** Convert levels (height, width, 3) to the model's input (3, height, width), rounded to float32 after each step as in PyTorch. */
export function normalize(levels, {scale, mean, std}) {
  const round = Math.fround, count = levels.length / 3, pixels = new Float32Array(levels.length);
  for (let c = 0; c < 3; c++) {
    const table = Float32Array.from({length: 256}, (_, v) => round(round(round(v * round(scale)) - round(mean[c])) / round(std[c])));
    for (let i = 0; i < count; i++) pixels[c * count + i] = table[levels[3 * i + c]];
  }
  return pixels;
}

// ------------------------------------------------------------------------------------------------------------- the worker

async function bytesOf(name, progress) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`missing ${name}`);
  progress(name);
  return new Uint8Array(await response.arrayBuffer());
}

function startWorker() {
  let ort, about, session, provider, resizer;

  const actions = {
    async start(model, threads, gpu) {
      about = model;
      ort = await import(new URL(about.runtime.module, import.meta.url));
      ort.env.wasm.wasmPaths = new URL('runtime/', import.meta.url).href;
      ort.env.wasm.numThreads = threads;
      ort.env.logLevel = 'error';
      provider = gpu && about.runtime.webgpu && navigator.gpu && (await navigator.gpu.requestAdapter()) ? 'webgpu' : 'wasm';
      return provider;
    },

    async load(index) {
      await session?.release();
      session = null;
      const progress = (name) => postMessage({progress: name});
      const [graph, weights] = await Promise.all([about.graphs[index].file, about.weights].map((name) => bytesOf(name, progress)));
      const externalData = weights.length ? [{path: about.weights.split('/').pop(), data: weights}] : [];
      const create = () => ort.InferenceSession.create(graph, {executionProviders: [provider], externalData, graphOptimizationLevel: 'all'});
      try {
        session = await create();
      } catch (error) {
        if (provider === 'wasm') throw error;
        provider = 'wasm'; // the GPU cannot run this model
        session = await create();
      }
      return {provider, bytes: graph.length + weights.length};
    },

    begin(width, height) {
      resizer = new Resizer(width, height, about.image.resize, about.image.filter);
    },

    strip(rgba, top) {
      resizer.add(rgba, top);
    },

    finish() {
      const levels = crop(resizer.finish(), about.image.resize, about.image.crop);
      resizer = null;
      return levels;
    },

    async look(levels, seconds) {
      const [height, width] = about.image.crop, pixels = normalize(levels, about.image);
      const feeds = {pixel_values: new ort.Tensor('float32', pixels, [1, 3, height, width])};
      const start = performance.now(), times = [];
      let output;
      do {
        const before = performance.now();
        output = await session.run(feeds);
        times.push(performance.now() - before);
      } while (times.length < 1 + RUNS && performance.now() - start < 1000 * seconds);
      if (times.length > 1) times.shift(); // the first run is a warm-up
      const [logits, shares] = ['logits', 'shares'].map((name) => output[name] && Float32Array.from(output[name].data));
      return {logits, shares, times, pixels};
    },
  };

  let last = Promise.resolve(); // actions run one after another
  onmessage = ({data: {id, action, values}}) => {
    last = last.then(async () => {
      try {
        postMessage({id, result: await actions[action](...values)});
      } catch (error) {
        postMessage({id, error: `${error?.message ?? error}`});
      }
    });
  };
}

// --------------------------------------------------------------------------------------------------------------- the page

const one = (selector, root = document) => root.querySelector(selector);
const say = (element, text) => { element.textContent = text; element.hidden = !text; };
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function element(name, text = '', attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** Return the message for an error of the worker. */
export function sentence(text) {
  if (/memory|bad_alloc|allocat|RangeError|ERROR_CODE: 6/i.test(text)) {
    return 'This device does not have enough free memory for the model. Close other tabs and programs, and reload the page.';
  }
  if (/missing|fetch|network|load failed/i.test(text)) {
    return navigator.onLine ? 'Files of the model are missing, perhaps because it was updated. Reload the page.'
      : 'The device is offline, and the page has not been loaded completely before. Go online once and reload it.';
  }
  return `The model could not run here (${text.split('\n')[0].slice(0, 160)}). Reload the page, or try another browser.`;
}

/** Return why this browser cannot run the page; an empty text if it can. */
function lacking() {
  const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 9, 1, 7, 0, 65, 0, 253, 15, 26, 11];
  const lacks = [];
  if (typeof WebAssembly !== 'object' || !WebAssembly.validate(Uint8Array.from(simd))) lacks.push('WebAssembly with SIMD');
  if (typeof createImageBitmap !== 'function') lacks.push('createImageBitmap');
  if (typeof Worker !== 'function') lacks.push('workers');
  return lacks.length ? `This browser does not support ${lacks.join(' and ')}. Update it, or use a recent Chrome, Firefox or Safari.` : '';
}

class Engine {
  constructor() {
    this.waiting = new Map();
    this.number = 0;
    this.worker = new Worker(import.meta.url, {type: 'module'});
    this.worker.onmessage = ({data}) => {
      if (data.progress) return;
      const {resolve, reject} = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if ('error' in data) reject(new Error(data.error));
      else resolve(data.result);
    };
    this.worker.onerror = (event) => {
      event.preventDefault();
      for (const {reject} of this.waiting.values()) reject(new Error(event.message || 'the worker failed to load'));
      this.waiting.clear();
    };
  }

  ask(action, values = [], transfer = []) {
    return new Promise((resolve, reject) => {
      this.waiting.set(++this.number, {resolve, reject});
      this.worker.postMessage({id: this.number, action, values}, transfer);
    });
  }
}

class Unreadable extends Error {}

/** Return the preprocessed levels of an image file, decoded as in Pillow: rotated by EXIF, on white, without color management. */
async function read(file, engine, busy) {
  const name = file.name || 'The image';
  if (file.size > MOST_BYTES) throw new Unreadable(`${name} has ${megabytes(file.size)}; the limit is ${megabytes(MOST_BYTES)}. Use a smaller file.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {premultiplyAlpha: 'none', colorSpaceConversion: 'none', imageOrientation: 'from-image'});
  } catch {
    throw new Unreadable(file.size > 10e6
      ? `${name} could not be read: it is damaged, not an image that this browser supports, or too large for the memory of this device. Try a smaller JPEG or PNG file.`
      : `${name} is damaged, or not an image that this browser supports. Try another JPEG or PNG file.`);
  }
  try {
    const {width, height} = bitmap, count = width * height;
    if (count > MOST_PIXELS) throw new Unreadable(`${name} has ${Math.round(count / 1e6)} million pixels; the limit is ${MOST_PIXELS / 1e6}. Use a smaller image.`);
    if (count > LARGE_PIXELS) busy(`Reading ${Math.round(count / 1e6)} million pixels: this takes a few seconds.`);
    await engine.ask('begin', [width, height]);
    const rows = Math.max(1, Math.min(height, Math.floor(STRIP_PIXELS / width)));
    const canvas = Object.assign(document.createElement('canvas'), {width, height: rows});
    const context = canvas.getContext('2d', {willReadFrequently: true, colorSpace: 'srgb'});
    if (!context) throw new Unreadable(`${name} is too wide for this browser. Use a smaller image.`);
    context.fillStyle = '#fff';
    for (let top = 0; top < height; top += rows) {
      const count = Math.min(rows, height - top);
      context.fillRect(0, 0, width, rows);
      context.drawImage(bitmap, 0, top, width, count, 0, 0, width, count);
      const {data} = context.getImageData(0, 0, width, count);
      await engine.ask('strip', [data, top], [data.buffer]);
    }
    return await engine.ask('finish');
  } catch (error) {
    if (error instanceof Unreadable || !/memory|allocat|RangeError/i.test(`${error}`)) throw error;
    throw new Unreadable(`${name} is too large for the memory of this device. Use a smaller image.`);
  } finally {
    bitmap.close();
  }
}

function draw(canvas, levels, [height, width], brightness = () => 1) {
  Object.assign(canvas, {width, height});
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const bright = brightness(Math.floor(i / width), i % width);
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = levels[3 * i + c] * bright;
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
}

function probabilities(logits, independent) {
  if (independent) return Array.from(logits, (logit) => 1 / (1 + Math.exp(-logit)));
  const most = Math.max(...logits), powers = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

class Panel {
  constructor(page, letter) {
    Object.assign(this, {page, letter, levels: null, turn: 0});
    this.root = one('#panel').content.cloneNode(true).firstElementChild;
    this.root.setAttribute('aria-label', `Image ${letter}`);
    this.root.id = `panel-${letter}`;
    one('h2', this.root).textContent = `Image ${letter}`;
    for (const input of this.root.querySelectorAll('input')) {
      input.setAttribute('aria-label', `${input.nextElementSibling.textContent}, image ${letter}`);
      input.addEventListener('change', () => {
        if (input.files.length) this.choose(input.files[0]);
        input.value = ''; // allow the same file to be chosen again
      });
    }
    for (const event of ['dragenter', 'dragover', 'dragleave', 'drop']) {
      this.root.addEventListener(event, (happened) => {
        happened.preventDefault();
        this.root.classList.toggle('over', event === 'dragenter' || event === 'dragover');
        if (event === 'drop' && happened.dataTransfer.files.length) this.choose(happened.dataTransfer.files[0]);
      });
    }
    one('#panels').append(this.root);
  }

  get problem() { return one('.error', this.root); }

  busy(text) { one('.busy', this.root).textContent = text; }

  async choose(file) {
    const turn = ++this.turn;
    say(this.problem, '');
    this.busy('Reading the image …');
    try {
      const levels = await this.page.queue(() => read(file, this.page.engine, (text) => this.busy(text)));
      if (turn !== this.turn) return;
      this.levels = levels;
      await this.look();
    } catch (error) {
      if (turn !== this.turn) return;
      const kept = this.levels ? ' The results below are those of the previous image.' : '';
      say(this.problem, (error instanceof Unreadable ? error.message : sentence(error.message)) + kept);
    } finally {
      if (turn === this.turn) this.busy('');
    }
  }

  async look() {
    if (!this.levels) return;
    this.busy('Classifying …');
    const index = this.page.graph;
    const result = await this.page.queue(async () => {
      await this.page.ready;
      return this.page.engine.ask('look', [this.levels, RUN_SECONDS]);
    });
    if (index !== this.page.graph) return;
    this.show(result, this.page.about.graphs[index]);
    this.busy('');
  }

  show({logits, shares, times, pixels}, graph) {
    const {about} = this.page, root = this.root;
    (globalThis.ufgir ??= {})[this.letter] = {logits, shares, times, pixels, levels: this.levels};
    draw(one('.seen canvas', root), this.levels, about.image.crop);
    const chances = probabilities(logits, about.independent);
    const best = chances.map((_, index) => index).sort((a, b) => chances[b] - chances[a]).slice(0, TOP_CLASSES);
    one('.prediction tbody', root).replaceChildren(...best.map((index) => {
      const row = document.createElement('tr'), bar = document.createElement('td'), percent = `${(100 * chances[index]).toFixed(1)} %`;
      const fill = bar.appendChild(element('span', '', {class: 'fill'}));
      fill.style.width = `${100 * chances[index]}%`;
      row.append(element('th', about.classes[index], {scope: 'row'}), bar, element('td', percent));
      return row;
    }));
    const sure = chances[best[0]] >= about.sure;
    say(one('.unsure', root), sure ? '' : `Uncertain: the best class has a probability of only ${(100 * chances[best[0]]).toFixed(0)} %. The leaf may belong to none of the ${about.classes.length} classes, or the image may be unclear.`);
    one('.known', root).textContent = `The model knows only its ${about.classes.length} classes. A high probability does not mean that the prediction is correct.`;
    this.showStages(shares, graph);
    const giga = (macs) => (macs / 1e9).toPrecision(3), share = (100 * graph.macs) / about.denseMacs;
    const facts = [
      ['GMACs', `${giga(graph.macs)}, ${share.toFixed(0)} % of the dense model's ${giga(about.denseMacs)}`],
      ['Latency on this device', `${median(times).toFixed(1)} ms (median of ${times.length}, ${this.page.means})`],
    ];
    one('.cost tbody', root).replaceChildren(...facts.map(([name, value]) => {
      const row = document.createElement('tr');
      row.append(element('th', name, {scope: 'row'}), element('td', value));
      return row;
    }));
    one('.tokens', root).textContent = `Tokens in each layer: ${graph.tokens.join(' → ')}.`;
    one('.results', root).hidden = false;
    root.dataset.shown = String(Number(root.dataset.shown ?? 0) + 1);
  }

  showStages(shares, graph) {
    const {about} = this.page, {crop: size} = about.image, [rows, columns] = about.grid, patches = rows * columns;
    one('.kept', this.root).hidden = !shares;
    if (!shares) return;
    one('.stages', this.root).replaceChildren(...graph.stages.map((layer, stage) => {
      const here = shares.subarray(stage * patches, (stage + 1) * patches), kept = here.filter((share) => share > OWN).length;
      const merged = here.filter((share) => share > 0.001 && share <= OWN).length;
      const text = `${kept} of ${patches} patches kept${merged ? `, ${merged} merged` : ''}`;
      const figure = document.createElement('figure'), canvas = element('canvas', '', {role: 'img', 'aria-label': `After layer ${layer}: ${text}`});
      draw(canvas, this.levels, size, (y, x) => {
        const patch = Math.floor((y * rows) / size[0]) * columns + Math.floor((x * columns) / size[1]);
        return DARK + (1 - DARK) * Math.min(1, Math.max(0, here[patch]));
      });
      figure.append(canvas, element('figcaption', `After layer ${layer}: ${text}`));
      return figure;
    }));
  }
}

class Page {
  constructor(about) {
    Object.assign(this, {about, graph: 0, provider: 'wasm', last: Promise.resolve()});
    const wanted = Number(new URL(location).searchParams.get('threads')) || MOST_THREADS;
    this.threads = globalThis.crossOriginIsolated ? Math.max(1, Math.min(navigator.hardwareConcurrency || 1, wanted, MOST_THREADS)) : 1;
    this.engine = new Engine();
    this.panels = [new Panel(this, 'A'), new Panel(this, 'B')];
    this.compare(false);
    one('#two').addEventListener('change', (event) => this.compare(event.target.checked));
    this.offerRates();
    one('#about').append(...about.about.map((line) => element('p', `${line}.`)),
      element('p', `Weights: ${about.precision}. ONNX Runtime Web ${about.runtime.version}. An image is sure if its best class has ${100 * about.sure} % or more; a sure answer can be wrong, above all for a leaf of no known class.`));
  }

  /** One image at a time. */
  queue(work) {
    const next = this.last.then(work);
    this.last = next.catch(() => {});
    return next;
  }

  get means() {
    return this.provider === 'webgpu' ? 'WebGPU' : `${this.threads} thread${this.threads > 1 ? 's' : ''}`;
  }

  compare(two) {
    this.panels[1].root.hidden = !two;
  }

  offerRates() {
    const {graphs} = this.about, field = one('#rates');
    field.hidden = graphs.length < 2;
    graphs.forEach((graph, index) => {
      const label = element('label'), input = element('input', '', {type: 'radio', name: 'rate', value: index});
      input.checked = index === 0;
      input.addEventListener('change', () => this.choose(index));
      label.append(input, ` ${graph.keepRate ?? 'as trained'}`);
      field.append(label);
    });
  }

  start() {
    this.started = this.engine.ask('start', [this.about, this.threads, new URL(location).searchParams.get('gpu') !== '0']);
    return this.choose(0);
  }

  async choose(index) {
    this.graph = index;
    say(one('#status'), 'Loading the model …');
    say(one('#problem'), '');
    this.ready = this.queue(async () => {
      await this.started;
      return this.engine.ask('load', [index]);
    });
    this.ready.catch(() => {});
    try {
      const {provider, bytes} = await this.ready;
      this.provider = provider;
      if (index !== this.graph) return;
      const alone = globalThis.crossOriginIsolated || provider === 'webgpu';
      const why = alone ? '' : isSecureContext ? ' (reload the page once to use more threads)' : ' (browsers allow more threads, and offline use, only over HTTPS)';
      say(one('#status'), `Ready. The model (${megabytes(bytes)}) runs on this device with ${this.means}${why}.`);
      for (const panel of this.panels) await panel.look();
    } catch (error) {
      say(one('#status'), '');
      say(one('#problem'), sentence(error.message));
    }
  }
}

/** Install the service worker for offline use, and show a message when a newer model is available. */
async function keep(page) {
  if (!('serviceWorker' in navigator) || !isSecureContext) return;
  const had = Boolean(navigator.serviceWorker.controller);
  navigator.serviceWorker.addEventListener('controllerchange', () => {
    if (had) one('#update').hidden = false;
    else if (!globalThis.crossOriginIsolated && page && page.panels.every((panel) => panel.turn === 0)) location.reload(); // to enable threads
  });
  one('#reload').addEventListener('click', () => location.reload());
  try {
    await navigator.serviceWorker.register(new URL('sw.js', import.meta.url), {updateViaCache: 'none'});
  } catch (error) {
    console.warn(`The page is not available offline: ${error.message}`); // the browser forbids service workers
  }
}

async function startPage() {
  one('#cannot').remove();
  one('#app').hidden = false;
  const lacks = lacking();
  if (lacks) {
    say(one('#status'), '');
    say(one('#problem'), lacks);
    return;
  }
  let page;
  try {
    const about = await (await fetch(new URL('model.json', import.meta.url))).json();
    page = new Page(about);
    keep(page);
    await page.start();
  } catch (error) {
    say(one('#status'), '');
    say(one('#problem'), sentence(`${error.message}`));
  }
}

if (typeof document === 'object') startPage();
else startWorker();
