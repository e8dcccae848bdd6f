// The panels about the text: its surprisal, the alternatives, generation, and comparing runs.

"use strict";

const STRONGEST = 8; // bits of surprisal that get the full color
const FULL_DIFFERENCE = 4; // bits between two runs that get the full color
const ALTERNATIVES = 10;
const DWELL = 60; // milliseconds: a pointer on its way elsewhere selects nothing
const COMPARED = 256; // characters at the end of the text that runs are compared on
const CONTINUED = 100; // characters that each run adds

function startText() {
  const [input, characters] = [find("#input"), find("#characters")];
  input.addEventListener("input", (event) => {
    if (!event.isComposing) readInput();
  });
  input.addEventListener("compositionend", readInput);
  let timer;
  characters.addEventListener("pointerover", ({ target, pointerType }) => {
    clearTimeout(timer);
    const character = target.closest(".character");
    if (character && pointerType !== "touch") timer = setTimeout(() => select(+character.dataset.i), DWELL);
  });
  for (const name of ["pointerleave", "focusin"])
    characters.addEventListener(name, () => clearTimeout(timer));
  characters.addEventListener("click", ({ target }) => target.closest(".character")?.focus());
  roving(characters, ".character", (each) => select(+each.dataset.i));
  for (const each of all(".undo")) each.onclick = undo;
  find("#next").onclick = () => {
    stop();
    step("next");
  };
  find("#play").onclick = () => (state.playing ? stop() : play());
  for (const name of ["#temperature", "#top-k", "#seed"]) {
    find(name).oninput = () => {
      drawControls();
      predict();
    };
  }
  find("#other-choice").value = Math.min(1, runs.length - 1);
  find("#other-choice").onchange = compare;
  find("#continue").onclick = continueAll;
  makeBars(find("#alternatives"), branch);
  makeBars(find("#next-bars"), (id) => appendToken(id, "next"));
}

// What was typed or pasted, without the characters that the model does not know.
function readInput() {
  stop();
  const input = find("#input");
  const { ids, unknown } = encode(state.run, input.value);
  if (unknown.length) {
    const before = encode(state.run, input.value.slice(0, input.selectionStart)).ids;
    const caret = decode(state.run, before).length;
    input.value = decode(state.run, ids);
    input.setSelectionRange(caret, caret);
  }
  if (unknown.length || input.value !== state.text) refuse(unknown);
  changeText(input.value, "typing");
}

function refuse(unknown) {
  const some = unknown.slice(0, 5).map(quoted).join(" ") + (unknown.length > 5 ? " …" : "");
  find("#message").textContent = unknown.length ? `Left out ${some}: not in the vocabulary.` : "";
}

function changeText(text, kind) {
  const isContinued = ["typing", "play"].includes(kind) && state.past.at(-1)?.kind === kind;
  if (text === state.text) return null;
  if (!isContinued) state.past.push({ text: state.text, kind });
  return showText(text);
}

function showText(text) {
  Object.assign(state, { text, position: Infinity });
  if (find("#input").value !== text) find("#input").value = text;
  return refresh();
}

function undo() {
  stop();
  const last = state.past.pop();
  if (last) showText(decode(state.run, encode(state.run, last.text).ids));
}

// Characters in a row, made once and then changed, so that the focused one stays focused.
function drawCharacters(box, count, change, role = "img") {
  while (box.children.length > count) box.lastChild.remove();
  while (box.children.length < count)
    box.append(h("span", { className: "character", tabIndex: -1, role }, h("bdi")));
  [...box.children].forEach((each, i) => {
    const { token, color, words } = change(i);
    each.dataset.i = i;
    each.title = `${glyph(token)} ${words}`;
    each.setAttribute("aria-label", each.title);
    each.classList.toggle("newline", token.endsWith("\n"));
    each.firstChild.textContent = glyph(token);
    each.firstChild.style.backgroundColor = color;
  });
}

function drawText() {
  const { trace, shown, past } = state;
  drawCharacters(
    find("#characters"),
    shown.ids.length,
    (i) => {
      const loss = trace.losses[i];
      const words = loss === null ? "not predicted" : `${number(bits(loss), 2)} bits`;
      return { token: tokenAt(i), color: mix("heat", bits(loss ?? 0) / STRONGEST), words };
    },
    "option",
  );
  if (state.position === shown.ids.length - 1)
    find("#characters").scrollTop = find("#characters").scrollHeight;
  const words = `Only the last ${plural(shown.ids.length, nounOf(state.run))} are shown: more do not fit the model's context.`;
  find("#cut").textContent = shown.start ? words : "";
  for (const each of all(".undo")) each.disabled = !past.length;
}

function drawLegend() {
  const steps = [0, 2, 4, 6, STRONGEST].map((value) => {
    const each = h("span", {}, value === STRONGEST ? `${value}+ bits` : String(value));
    each.style.backgroundColor = mix("heat", value / STRONGEST);
    return each;
  });
  find("#legend").replaceChildren("surprisal", ...steps);
}

// A list of tokens with their probabilities, as buttons that stay where they are.
function makeBars(box, choose) {
  for (let i = 0; i <= ALTERNATIVES; i++) {
    const button = h(
      "button",
      { type: "button" },
      h("bdi"),
      h("span", { className: "track" }, h("i")),
      h("span"),
    );
    button.onclick = () => choose(+button.dataset.id);
    box.append(button);
  }
}

function drawBars(box, probabilities, chosen, words) {
  const ids = ranking(probabilities).slice(0, ALTERNATIVES);
  box.style.setProperty("--token", state.run.merges ? "9rem" : "3.2rem");
  if (chosen >= 0 && !ids.includes(chosen)) ids.push(chosen);
  [...box.children].forEach((button, i) => {
    const id = ids[i];
    button.disabled = id === undefined;
    button.classList.toggle("chosen", id === chosen);
    if (button.disabled) return;
    const [token, track, value] = button.children;
    button.dataset.id = id;
    token.textContent = glyph(state.run.vocabulary[id]);
    value.textContent = percent(probabilities[id]);
    track.firstChild.style.width = `${100 * probabilities[id]}%`;
    button.setAttribute(
      "aria-label",
      `${token.textContent} ${value.textContent}${id === chosen ? words : ""}`,
    );
  });
}

function drawAlternatives() {
  const { run, trace, position, shown } = state;
  [...find("#characters").children].forEach((each, i) => {
    each.setAttribute("aria-selected", i === position);
    each.tabIndex = i === position ? 0 : -1;
  });
  const hasAny = position > 0;
  find("#alternatives-title").textContent = hasAny
    ? `Instead of ${nounOf(state.run)} ${position + 1}, ${quoted(tokenAt(position))}`
    : "Alternatives";
  find("#no-alternatives").hidden = hasAny;
  const logits = hasAny ? rowOf(trace.logits, run.vocabulary.length, position - 1) : [];
  drawBars(find("#alternatives"), softmax(logits), hasAny ? shown.ids[position] : -1, ", in the text");
}

// Cut the text before the selected character, and continue with another.
function branch(id) {
  stop();
  const { run, text, shown, position } = state;
  const kept = encode(run, text).ids.slice(0, shown.start + position);
  changeText(decode(run, [...kept, id]), "branch");
}

function appendToken(id, kind) {
  const { run, text } = state;
  return changeText(decode(run, [...encode(run, text).ids, id]), kind);
}

function settings() {
  const [temperature, topK] = [+find("#temperature").value, +find("#top-k").value];
  return { temperature, topK, seed: Math.trunc(+find("#seed").value) };
}

// The sliders. With another vocabulary size, top-k is all tokens again.
function drawControls() {
  const slider = find("#top-k");
  const V = state.run.vocabulary.length;
  if (+slider.max !== V) Object.assign(slider, { max: V, value: V });
  const { temperature, topK } = settings();
  find("#temperature-value").textContent = number(temperature, 2);
  find("#top-k-value").textContent = topK === V ? `${V} (all)` : topK;
}

// The tokens to continue. As in sample.py, an empty text starts with a line feed.
function prompt(run, text) {
  const { ids } = encode(run, text);
  return ids.length ? ids : [run.tokenIds.get("\n") ?? 0];
}

const predict = latest(async (isStale) => {
  const { run, text } = state;
  const how = settings();
  const { id, logits } = await ask(run, "next", { ids: prompt(run, text), ...how });
  if (isStale() || run !== state.run) return;
  const kept = ranking(logits).slice(0, how.topK);
  const shares = softmax(
    Float64Array.from(kept, (each) => logits[each]),
    how.temperature || 1,
  );
  const probabilities = new Float64Array(logits.length);
  kept.forEach((each, i) => {
    probabilities[each] = how.temperature ? shares[i] : Number(i === 0);
  });
  drawBars(find("#next-bars"), probabilities, id, ", sampled next");
});

async function step(kind) {
  const { run, text } = state;
  const { id } = await ask(run, "next", { ids: prompt(run, text), ...settings() });
  if (run === state.run && text === state.text) await appendToken(id, kind);
}

async function play() {
  const mine = (state.playing = {});
  state.past.push({ text: state.text, kind: "play" });
  drawPlay();
  while (state.playing === mine) {
    await step("play");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

function stop() {
  if (!state.playing) return;
  state.playing = null;
  drawPlay();
  compare();
}

function drawPlay() {
  find("#play").textContent = state.playing ? "Stop" : "Play";
  find("#loss").setAttribute("aria-live", state.playing ? "off" : "polite");
}

// The tokens with which a run continues some others, in a session of its own.
async function* continuation(run, start, count, { temperature = 1, topK = 0, seed = 1 }) {
  const ids = start.length ? [...start] : prompt(run, "");
  const purpose = `continuation ${lastId}`;
  for (let i = 0; i < count; i++) {
    const { id } = await ask(run, "next", { ids, temperature, topK, seed, purpose });
    ids.push(id);
    yield id;
  }
}

// The surprisal under this run minus that of another, for every character of the text.
const compare = latest(async (isStale) => {
  if (runs.length < 2) return;
  const text = [...state.text].slice(-COMPARED).join("");
  const pair = [state.run, runs[find("#other-choice").value]];
  const [a, b] = pair.map((run) => encode(run, text));
  const [left, right] = await Promise.all([a, b].map(({ ids }, i) => ask(pair[i], "losses", { ids })));
  if (isStale()) return;
  const [first, second] = pair;
  find("#first-run").textContent = first.name;
  // Runs that cut the text into other tokens can be compared by their totals only.
  const isAligned = a.ids.every((id, i) => first.vocabulary[id] === second.vocabulary[b.ids[i]]);
  drawCharacters(find("#differences"), a.ids.length, (i) => {
    const difference = isAligned && i ? bits(left[i] - right[i]) : 0;
    const own = number(bits(left[i] ?? 0), 2);
    const both = isAligned ? `${own} − ${number(bits(right[i] ?? 0), 2)} = ${number(difference, 2)} bits` : `${own} bits`;
    return {
      token: first.vocabulary[a.ids[i]],
      color: diverging(difference / FULL_DIFFERENCE, "heat", "cold"),
      words: i ? both : "not predicted",
    };
  });
  const [total, other] = totals(pair, [a.ids, b.ids], [left, right]);
  find("#totals").textContent = b.unknown.length
    ? `${second.name} does not know ${b.unknown.map(quoted).join(" ")}.`
    : `${first.name}: ${number(total, 1)} bits. ${second.name}: ${number(other, 1)} bits. Difference: ${number(total - other, 1)} bits.`;
});

// Each run's bits for the same part of a text. Nothing predicts the first token, and runs may cut
// the text differently, so this part begins at the first border that both have.
function totals(pair, ids, losses) {
  const ends = pair.map((run, i) => {
    let end = 0;
    return ids[i].map((id) => (end += bytesOf(run.vocabulary[id]).length));
  });
  const border = ends[0].find((end) => ends[1].includes(end));
  return losses.map((each, i) => bits(sum(each.filter((_, t) => ends[i][t] > border))));
}

// The same prompt, seed, temperature and top-k for all runs, side by side.
async function continueAll() {
  const { text } = state;
  const how = settings();
  if (how.topK === state.run.vocabulary.length) how.topK = 0; // all, also in a larger vocabulary
  find("#continuations").replaceChildren();
  await Promise.all(
    runs.map(async (run) => {
      const added = h("b");
      const prompted = h("pre", {}, h("span", { className: "quiet" }, text), added);
      find("#continuations").append(h("article", {}, h("h3", {}, run.name), prompted));
      const { ids, unknown } = encode(run, text);
      if (unknown.length) {
        added.textContent = `\n(does not know ${unknown.map(quoted).join(" ")})`;
        return;
      }
      const next = [];
      for await (const id of continuation(run, ids, CONTINUED, how)) {
        next.push(id);
        added.textContent = decode(run, next);
      }
    }),
  );
}
