// Runs the models in a thread of its own, so that the page stays responsive.
//
// The page sends {call, id, ...arguments} and gets {id, result} back. Every call names a model by
// its index, a text as token ids, and the parts that are switched off.

"use strict";

const models = [];
const sessions = new Map(); // the latest, by model, purpose and what is switched off
const KEPT = 8; // and one more for each model, since all continue the text at once

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
      losses: lossesOf(logits, ids),
      attention: attentions.map((step) => session.caches.get(step).weights.map((rows) => square(rows, T))),
      lens: lens.map((rows) => rows.data.slice(0, T * rows.width)),
    };
  },

  // Only the losses, of a text of any length; one beyond the context is read as in sampling.
  losses({ model, ids, off }) {
    if (ids.length <= models[model].blockSize) {
      return lossesOf(sessionFor(model, ids, off).values.at(-1), ids);
    }
    let session = models[model].session(off);
    return ids.map((id, t) => {
      const loss = t ? lossOf(session.values.at(-1).row(session.ids.length - 1), id) : null;
      session = advance(models[model], session, id);
      return loss;
    });
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
    if (name === "heads") return averaged(session.caches.get(step), position, channel);
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

  // All values of a tensor.
  numbers({ model, tensor }) {
    return models[model].tensors[tensor].data;
  },

  // The next token of a text, sampled as common.py does; the numbers come from the seed. Each
  // purpose has a session of its own: after a restart, the context depends on how a text grew.
  next({ model, ids, off, temperature, topK, seed, purpose = "sample" }) {
    const session = sessionFor(model, ids, off, purpose);
    const logits = session.values
      .at(-1)
      .row(session.ids.length - 1)
      .slice();
    return { id: choose(logits, temperature, topK, random(seed, ids.length)), logits };
  },
};

onmessage = ({ data }) => {
  try {
    postMessage({ id: data.id, result: calls[data.call](data) });
  } catch (error) {
    postMessage({ id: data.id, error: String(error) });
  }
};

// A session that has computed these ids: an earlier one if the text has only grown.
function sessionFor(index, ids, off, purpose = "") {
  const model = models[index];
  const key = [index, purpose, ...[...off].sort()].join();
  const last = sessions.get(key);
  const grows = last && last.text.length <= ids.length && last.text.every((id, t) => id === ids[t]);
  let session = grows ? last.session : model.session(off);
  const missing = ids.slice(grows ? last.text.length : 0);
  if (!purpose) model.extend(session, missing);
  else if (!grows) model.extend(session, missing.slice(-model.blockSize));
  else for (const id of missing) session = advance(model, session, id);
  sessions.delete(key); // so that the newest is the last
  sessions.set(key, { session, text: [...ids] });
  if (sessions.size > KEPT + models.length) sessions.delete(sessions.keys().next().value);
  return session;
}

// −log p of a token. Not by way of p, which is 0 in float32 where the model is sure and wrong.
function lossOf(logits, id) {
  const highest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  return highest + Math.log(logits.reduce((sum, x) => sum + Math.exp(x - highest), 0)) - logits[id];
}

const lossesOf = (logits, ids) => ids.map((id, t) => (t ? lossOf(logits.row(t - 1), id) : null));

// The products whose sum is one number of a head's output: attention weights times values.
function averaged(cache, position, channel) {
  const head = Math.floor((channel * cache.weights.length) / cache.value.width);
  const { first, weights } = cache.weights[head][position];
  return { first, x: weights, weights: weights.map((_, s) => cache.value.row(first + s)[channel]), bias: 0 };
}

// As in common.py: a text longer than the context starts again with its second half, unless
// attention has a sliding window.
function advance(model, session, id) {
  const fits = model.slides || session.ids.length < model.blockSize;
  const next = fits ? session : model.session(session.off);
  const kept = [...session.ids, id].slice(-Math.max(1, model.blockSize >> 1));
  model.extend(next, fits ? [id] : kept);
  return next;
}

function choose(logits, temperature, topK, uniform) {
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a]);
  if (temperature === 0) return order[0];
  const kept = order.slice(0, topK || order.length);
  const probabilities = softmax(
    Float64Array.from(kept, (i) => logits[i]),
    temperature,
  );
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
