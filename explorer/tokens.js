// From a text to token ids and back: characters, or the byte pairs of bpe.py.
//
// A token may hold only a part of a character's bytes. In a text, the page writes such a byte as
// one of the characters U+DC80 to U+DCFF, which no real text contains.

"use strict";

const BYTE = 0xdc00; // plus the byte: the character that stands for it
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

// The lookup tables for a run's vocabulary.
function tokensOf({ vocabulary, merges, bytes }) {
  const idsOf = (tokens) => new Map(tokens.map((token, id) => [token, id]));
  if (!merges) return { tokenIds: idsOf(vocabulary) };
  const tokenBytes = bytes.map((byte) => [byte]);
  for (const pair of merges) tokenBytes.push(pair.flatMap((id) => tokenBytes[id]));
  const tokens = tokenBytes.map(textOf);
  const ranks = new Map(merges.map((pair, i) => [String(pair), i]));
  return { vocabulary: tokens, tokenIds: idsOf(tokens), tokenBytes, ranks };
}

// The ids of a text, and its characters that the vocabulary lacks.
function encode(run, text) {
  if (run.merges) {
    const words = text.match(new RegExp(run.pattern, "gu")) ?? [];
    return { ids: words.flatMap((word) => bytePairs(run, word)), unknown: [] };
  }
  const characters = [...text];
  const unknown = characters.filter((each) => !run.tokenIds.has(each));
  const ids = characters.map((each) => run.tokenIds.get(each)).filter((id) => id !== undefined);
  return { ids, unknown: [...new Set(unknown)] };
}

// The ids of one word: apply the earliest-learned merge until none applies.
function bytePairs(run, word) {
  let ids = bytesOf(word).map((byte) => run.bytes.indexOf(byte));
  for (;;) {
    const ranks = ids.map((id, i) => run.ranks.get(`${id},${ids[i + 1]}`) ?? Infinity);
    const rank = Math.min(...ranks);
    if (rank === Infinity) return ids;
    const merged = [];
    for (let i = 0; i < ids.length; i++) {
      const isPair = ranks[i] === rank;
      merged.push(isPair ? run.bytes.length + rank : ids[i]);
      if (isPair) i += 1;
    }
    ids = merged;
  }
}

function decode(run, ids) {
  if (!run.merges) return ids.map((id) => run.vocabulary[id]).join("");
  return textOf(ids.flatMap((id) => run.tokenBytes[id]));
}

function bytesOf(text) {
  const encoder = new TextEncoder();
  return [...text].flatMap((each) => {
    const code = each.codePointAt(0);
    return code >= BYTE + 128 && code < BYTE + 256 ? [code - BYTE] : [...encoder.encode(each)];
  });
}

function textOf(bytes) {
  let text = "";
  for (let i = 0, length; i < bytes.length; i += length) {
    length = bytes[i] >= 0xf0 ? 4 : bytes[i] >= 0xe0 ? 3 : bytes[i] >= 0xc0 ? 2 : 1;
    try {
      text += utf8.decode(Uint8Array.from(bytes.slice(i, i + length)));
    } catch {
      text += String.fromCharCode(BYTE + bytes[i]);
      length = 1;
    }
  }
  return text;
}
