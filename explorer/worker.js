// Runs the models in a thread of its own, so that the page stays responsive.
//
// The page sends {call, id, ...arguments} and gets {id, result} back. Every call names a model by
// its index, a text as token ids, and the parts that are switched off.

"use strict";

const models = [];
const sessions = []; // for each model, the session of the last call

const calls = {
  load({ models: abouts, weights }) {
    abouts.forEach((about, i) => models.push(new Model(about, decode(about.tensors, weights[i]))));
  },

  // Everything that the page shows of a text: logits, losses, attention weights, logit lens.
  trace({ model, ids, off }) {
    const session = sessionFor(model, ids, off);
    const { attentions, layers } = models[model];
    const logits = session.values.at(-1);
    const T = ids.length;
    const lens = layers.map((layer) => models[model].lens(session, layer));
    return {
      logits: logits.data.slice(0, T * logits.width),
      losses: ids.map((id, t) => (t ? -Math.log(softmax(logits.row(t - 1))[id]) : null)),
      attention: attentions.map((step) =>
        session.caches.get(step).weights.map((rows) => square(rows, T))),
      lens: lens.map((rows) => rows.data.slice(0, T * rows.width)),
    };
  },

  // The scores of one head before the mask: every query with every key, also those after it.
  scores({ model, ids, off, layer, head }) {
    const step = models[model].attentions[layer];
    const cache = sessionFor(model, ids, off).caches.get(step);
    const D = cache.query.width / step.heads;
    return ids.map((_, t) => models[model].scores(cache, head, D, t, 0, ids.length - 1));
  },

  // One step's output at one position; for attention also what it computes on the way.
  vectors({ model, ids, off, step, position }) {
    const session = sessionFor(model, ids, off);
    const found = { out: session.values[step].row(position).slice() };
    const cache = session.caches.get(models[model].steps[step]);
    for (const name of cache ? ["query", "key", "value", "heads"] : []) {
      found[name] = cache[name].row(position).slice();
    }
    return found;
  },

  // The products whose sum is one number: of a linear layer or a projection of attention.
  products({ model, ids, off, step: index, name, position, channel }) {
    const session = sessionFor(model, ids, off);
    const [step, tensors] = [models[model].steps[index], models[model].tensors];
    const isOut = step.kind === "attention" && name === "out";
    const x = isOut ? session.caches.get(step).heads : session.values[step.x.step];
    const weight = tensors[step.kind === "attention" ? step[name] : step.weight];
    const bias = tensors[step.kind === "attention" ? (isOut ? step.out_bias : null) : step.bias];
    const width = weight.shape[1];
    return {
      x: x.row(position).slice(0, width),
      weights: weight.data.slice(channel * width, (channel + 1) * width),
      bias: bias ? bias.data[channel] : 0,
    };
  },

  // The next token of a text, sampled as common.py does; the numbers come from the seed.
  next({ model, ids, off, temperature, topK, seed }) {
    const session = sessionFor(model, ids, off, true);
    const logits = session.values.at(-1).row(session.ids.length - 1);
    return choose(logits, temperature, topK, random(seed, ids.length));
  },
};

onmessage = ({ data }) => {
  try {
    postMessage({ id: data.id, result: calls[data.call](data) });
  } catch (error) {
    postMessage({ id: data.id, error: String(error) });
  }
};

// A session that has computed these ids: the last one again if the text has only grown.
function sessionFor(index, ids, off, isGenerating = false) {
  const [model, last] = [models[index], sessions[index]];
  const offs = [...off].sort().join();
  const grows = last && last.offs === offs && last.isGenerating === isGenerating &&
    last.text.length <= ids.length && last.text.every((id, t) => id === ids[t]);
  let session = grows ? last.session : model.session(off);
  const missing = ids.slice(grows ? last.text.length : 0);
  if (!isGenerating) model.extend(session, missing);
  else if (!grows) model.extend(session, missing.slice(-model.blockSize));
  else for (const id of missing) session = model.advance(session, id);
  sessions[index] = { session, offs, isGenerating, text: [...ids] };
  return session;
}

function choose(logits, temperature, topK, uniform) {
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a]);
  if (temperature === 0) return order[0];
  const kept = order.slice(0, topK || order.length);
  const probabilities = softmax(Float64Array.from(kept, (i) => logits[i]), temperature);
  let sum = 0;
  return kept[probabilities.findIndex((p) => (sum += p) > uniform)] ?? kept[0];
}

// A number from 0 to 1 that depends on the seed and the position only (the generator mulberry32).
function random(seed, position) {
  let a = (Math.imul(seed, 0x9e3779b1) + Math.imul(position + 1, 0x6d2b79f5)) | 0;
  a = Math.imul(a ^ (a >>> 15), a | 1);
  a ^= a + Math.imul(a ^ (a >>> 7), a | 61);
  return ((a ^ (a >>> 14)) >>> 0) / 2 ** 32;
}

// Attention weights as a T × T matrix, row by row; what is masked is 0.
function square(rows, T) {
  const matrix = new Float32Array(T * T);
  rows.slice(0, T).forEach(({ first, weights }, t) => matrix.set(weights, t * T + first));
  return matrix;
}

// Base64 of float16 numbers, one tensor after the other, as float32.
function decode(shapes, base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const halves = new Uint16Array(bytes.buffer);
  const table = Float32Array.from({ length: 2 ** 16 }, (_, bits) => {
    const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
  const tensors = {};
  let start = 0;
  for (const [name, shape] of Object.entries(shapes)) {
    const length = shape.reduce((a, b) => a * b, 1);
    const data = new Float32Array(length);
    for (let i = 0; i < length; i++) data[i] = table[halves[start + i]];
    tensors[name] = { shape, data };
    start += length;
  }
  return tensors;
}
