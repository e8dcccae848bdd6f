// The forward pass: from token ids to the logits of the next one.
//
// A model is a list of steps, which Python has recorded (steps.py), and the tensors they use. Each
// step computes one row per position from the rows of earlier steps, for example
//
//     {kind: "linear", x: {step: 3}, weight: "lm_head.weight", bias: null, width: 65}
//
// A session keeps all rows, so a text that grows by one character costs one new row per step; for
// attention this is what a KV cache does. Parts of the model can be switched off: `off` is a set of
// names such as "blocks.0.attention", "blocks.0.attention.head 2", "skips", "norms".

"use strict";

class Model {
  constructor(about, tensors) {
    Object.assign(this, about); // steps, parts, layers, blockSize, slides, vocabulary, …
    this.tensors = tensors; // name: {shape, data: Float32Array}
    this.attentions = this.steps.filter((step) => step.kind === "attention");
    this.lastLayer = this.layers.length ? this.layers.at(-1).step : -1;
  }

  session(off = []) {
    const values = this.steps.map((step) => new Rows(step.width));
    const caches = new Map(this.attentions.map((step) => [step, new Cache(this, step)]));
    return { ids: [], off: new Set(off), values, caches };
  }

  // Continue a session's text; afterwards its last step holds the logits of every position.
  extend(session, ids) {
    const start = session.ids.length;
    session.ids.push(...ids);
    this.steps.forEach((step, i) => this.run(step, session.values[i], session, start));
    return session.values.at(-1);
  }

  // Compute the rows of one step, from position `start` to the end of the text.
  run(step, out, session, start, values = session.values) {
    const [{ ids, off }, x, end] = [session, step.x && values[step.x.step], session.ids.length];
    out.resize(end);
    if (step.part && off.has(step.part)) out.data.fill(0, start * out.width, end * out.width);
    else if (step.kind === "attention") this.attend(step, x, out, session, start);
    else if (step.table) {
      const { data } = this.tensors[step.table];
      for (let t = start; t < end; t++) {
        const i = (step.kind === "token" ? ids[t] : t) * out.width;
        out.row(t).set(data.subarray(i, i + out.width));
      }
    } else if (step.kind === "linear") {
      linear(x, this.tensors[step.weight], this.tensors[step.bias], out, start, end);
    } else if (step.kind.endsWith("norm")) {
      if (off.has("norms")) out.copy(x, start, end);
      else normalize(step, x, out, this.tensors, start, end);
    } else if (step.kind === "shift") {
      for (let t = start; t < end; t++) out.row(t).set(t ? x.row(t - 1) : new Float32Array(x.width));
    } else if (step.skip && off.has("skips")) {
      out.copy(this.rows(step.skip === "a" ? step.b : step.a, values), start, end);
    } else if (step.kind in BINARY) {
      const [a, b] = [this.rows(step.a, values), this.rows(step.b, values)];
      for (let t = start; t < end; t++) {
        const [to, left, right] = [out.row(t), a.row(t), b.row(t)];
        for (let i = 0; i < to.length; i++) {
          to[i] = BINARY[step.kind](left[i % left.length], right[i % right.length]);
        }
      }
    } else {
      const activation = UNARY[step.kind];
      for (let i = start * out.width; i < end * out.width; i++) out.data[i] = activation(x.data[i]);
    }
  }

  // An operand as rows: of a step, or the same row at each position.
  rows(operand, values) {
    if ("step" in operand) return values[operand.step];
    const row = "number" in operand ? [operand.number] : this.tensors[operand.tensor].data;
    return { row: () => row };
  }

  // Causal self-attention, one head after the other.
  attend(step, x, out, session, start) {
    const cache = session.caches.get(step);
    const [H, D, end] = [step.heads, cache.query.width / step.heads, session.ids.length];
    for (const name of ["query", "key", "value", "heads"]) cache[name].resize(end);
    for (const name of ["query", "key", "value"]) {
      linear(x, this.tensors[step[name]], null, cache[name], start, end);
    }
    for (let t = start; t < end; t++) {
      for (const row of [cache.query.row(t), cache.key.row(t)]) {
        for (let h = 0; h < H; h++) {
          const part = row.subarray(h * D, (h + 1) * D);
          if (step.norm_eps && !session.off.has("norms")) rmsNorm(part, part, step.norm_eps);
          if (step.frequencies && !session.off.has("rope")) rotate(part, t, step.frequencies);
        }
      }
    }
    for (let h = 0; h < H; h++) {
      const isOff = session.off.has(`${step.module}.head ${h}`);
      for (let t = start; t < end; t++) {
        // Query t attends to the keys from `first` to t: those after it are masked.
        const first = step.window ? Math.max(0, t + 1 - step.window) : 0;
        const weights = softmax(this.scores(cache, h, D, t, first));
        const head = cache.heads.row(t).subarray(h * D, (h + 1) * D).fill(0);
        for (let s = first; s <= t && !isOff; s++) {
          const [weight, value] = [weights[s - first], cache.value.row(s)];
          for (let d = 0; d < D; d++) head[d] += weight * value[h * D + d];
        }
        cache.weights[h][t] = { first, weights };
      }
    }
    if (step.out) {
      linear(cache.heads, this.tensors[step.out], this.tensors[step.out_bias], out, start, end);
    } else out.copy(cache.heads, start, end);
  }

  // Query t with the keys from `first` to `last`: dot products, divided by √D.
  scores(cache, h, D, t, first, last = t) {
    const query = cache.query.row(t).subarray(h * D, (h + 1) * D);
    const scores = new Float32Array(last + 1 - first);
    for (let s = first; s <= last; s++) {
      const key = cache.key.row(s).subarray(h * D, (h + 1) * D);
      scores[s - first] = dot(query, key) / Math.sqrt(D);
    }
    return scores;
  }

  // The logit lens: the logits that the model would compute if a layer's output were the last one.
  lens(session, layer) {
    const values = [...session.values];
    values[this.lastLayer] = session.values[layer.step];
    for (let i = this.lastLayer + 1; i < this.steps.length; i++) {
      values[i] = new Rows(this.steps[i].width);
      this.run(this.steps[i], values[i], session, 0, values);
    }
    return values.at(-1);
  }
}

// One row of numbers for each position, in a buffer that grows.
class Rows {
  constructor(width) {
    this.width = width;
    this.data = new Float32Array(0);
  }

  resize(count) {
    if (count * this.width <= this.data.length) return;
    const data = new Float32Array(Math.max(64, 2 ** Math.ceil(Math.log2(count))) * this.width);
    data.set(this.data);
    this.data = data;
  }

  row(t) {
    return this.data.subarray(t * this.width, (t + 1) * this.width);
  }

  copy(from, start, end) {
    for (let t = start; t < end; t++) this.row(t).set(from.row(t));
  }
}

// What attention computes on the way, for every position so far.
class Cache {
  constructor(model, step) {
    const width = model.tensors[step.query].shape[0]; // H*D
    for (const name of ["query", "key", "value", "heads"]) this[name] = new Rows(width);
    this.weights = Array.from({ length: step.heads }, () => []);
  }
}

const BINARY = { add: (a, b) => a + b, sub: (a, b) => a - b, mul: (a, b) => a * b };
const UNARY = {
  relu: (x) => Math.max(0, x),
  square: (x) => x * x,
  tanh: Math.tanh,
  sigmoid: (x) => 1 / (1 + Math.exp(-x)),
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu: (x) => (x * (1 + erf(x / Math.SQRT2))) / 2,
  gelu_tanh: (x) => (x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)))) / 2,
};

// out = x @ weight.T + bias. Four rows at a time, so that each weight is read once for all four.
function linear(x, weight, bias, out, start, end) {
  const [[rows, width], w, source] = [weight.shape, weight.data, x.data];
  for (let t = start; t < end; t += 4) {
    const count = Math.min(4, end - t);
    const [a, b] = [t * width, count > 1 ? (t + 1) * width : t * width];
    const [c, d] = [count > 2 ? (t + 2) * width : a, count > 3 ? (t + 3) * width : a];
    for (let j = 0; j < rows; j++) {
      let [p, q, r, s] = [0, 0, 0, 0];
      for (let i = 0, k = j * width; i < width; i++, k++) {
        p += w[k] * source[a + i];
        q += w[k] * source[b + i];
        r += w[k] * source[c + i];
        s += w[k] * source[d + i];
      }
      const sums = [p, q, r, s];
      for (let n = 0; n < count; n++) {
        out.data[(t + n) * rows + j] = sums[n] + (bias ? bias.data[j] : 0);
      }
    }
  }
}

function normalize(step, x, out, tensors, start, end) {
  const [scale, bias] = [tensors[step.weight], tensors[step.bias]];
  for (let t = start; t < end; t++) {
    const [from, to] = [x.row(t), out.row(t)];
    const mean = step.kind === "layer_norm" ? from.reduce((a, b) => a + b, 0) / from.length : 0;
    rmsNorm(from.map((value) => value - mean), to, step.eps);
    for (let i = 0; i < to.length; i++) {
      to[i] = to[i] * (scale ? scale.data[i] : 1) + (bias ? bias.data[i] : 0);
    }
  }
}

// x / sqrt(mean(x²) + eps); of numbers with mean 0 this is also what LayerNorm computes.
function rmsNorm(x, out, eps) {
  const scale = 1 / Math.sqrt(dot(x, x) / x.length + eps);
  for (let i = 0; i < x.length; i++) out[i] = x[i] * scale;
}

// RoPE: channels i and i + D/2 are a point in a plane, which turns with the position.
function rotate(x, position, frequencies) {
  const half = x.length / 2;
  for (let i = 0; i < half; i++) {
    const [cos, sin] = [Math.cos(position * frequencies[i]), Math.sin(position * frequencies[i])];
    const [a, b] = [x[i], x[i + half]];
    [x[i], x[i + half]] = [a * cos - b * sin, b * cos + a * sin];
  }
}

function softmax(scores, temperature = 1) {
  const highest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const odds = scores.map((score) => Math.exp((score - highest) / temperature));
  const sum = odds.reduce((a, b) => a + b, 0);
  return odds.map((each) => each / sum);
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

// The error function, to 1.5e-7 (Abramowitz and Stegun 7.1.26).
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
  const sum = series.reduce((total, factor) => (total + factor) * t, 0);
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}
