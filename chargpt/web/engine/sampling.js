// From logits to a character: filter the logits, then draw. The filters and their order are those
// of chargpt/engine/sampling.py. V is the size of the vocabulary.

const SMALLEST = 2 ** -126; // positive float32, as in Python

/**
 * @typedef {object} Settings
 * @property {number} temperature below 1: more predictable; above 1: more random; 0: the likeliest
 * @property {number} topK draw only from the k likeliest characters; 0: from all
 * @property {number} topP draw only from the likeliest that together have this probability
 * @property {number} minP draw only from those with at least this share of the likeliest one's
 * @property {number} seed of the random numbers, a whole number from 0 to 2⁵³ − 1
 */

/**
 * Returns the logits to draw from, relative to the largest: −Infinity for filtered tokens, at least
 * one is left. Each filter applies to the result of the one before: temperature, top-k (exactly k,
 * also with ties), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).
 * @param {Float32Array} logits (V,)
 * @param {Settings} settings
 * @returns {Float64Array} (V,)
 */
export function filterLogits(logits, { temperature, topK, topP, minP }) {
  if (temperature === 0) [topK, temperature] = [1, 1];
  const largest = largestOf(logits);
  const divisor = Math.max(temperature, SMALLEST);
  let kept = new Float64Array(logits).map((logit) => (logit - largest) / divisor);
  if (topK > 0 && topK < kept.length) kept = keepOnly(kept, descending(kept).slice(0, topK));
  if (topP < 1) kept = keepOnly(kept, nucleus(kept, topP));
  if (minP > 0) kept = kept.map((logit) => (logit < Math.log(minP) ? -Infinity : logit));
  return kept;
}

/** Returns the ids of the likeliest tokens: each has less than `topP` before it. At least one. */
function nucleus(logits, topP) {
  const probabilities = softmax(logits);
  const order = descending(logits);
  let before = 0;
  const end = order.findIndex((id, rank) => {
    const beyond = rank > 0 && before >= topP;
    before += probabilities[id];
    return beyond;
  });
  return end < 0 ? order : order.slice(0, end);
}

/** Returns all ids, the likeliest first; of equal ones, the lower id first. */
function descending(logits) {
  return Array.from(logits, (_, id) => id).sort((a, b) => logits[b] - logits[a] || a - b);
}

function keepOnly(logits, ids) {
  const kept = new Float64Array(logits.length).fill(-Infinity);
  for (const id of ids) kept[id] = logits[id];
  return kept;
}

function largestOf(values) {
  let largest = -Infinity;
  for (let i = 0; i < values.length; i++) if (values[i] > largest) largest = values[i];
  return largest;
}

function sumOf(values) {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i];
  return sum;
}

/**
 * Returns the probabilities of logits.
 * @param {Float32Array | Float64Array} logits (V,); at least one is finite
 * @returns {Float64Array} (V,)
 */
export function softmax(logits) {
  const largest = largestOf(logits);
  const weights = new Float64Array(logits).map((logit) => Math.exp(logit - largest));
  const sum = sumOf(weights);
  return weights.map((weight) => weight / sum);
}

/**
 * Draws a token by inverting the cumulative distribution.
 * @param {Float64Array} probabilities (V,)
 * @param {number} uniform a random number in [0, 1)
 * @returns {number} its id
 */
export function draw(probabilities, uniform) {
  const threshold = uniform * sumOf(probabilities); // the sum is 1, up to rounding
  let cumulative = 0;
  let possible = 0;
  for (let id = 0; id < probabilities.length; id++) {
    if (probabilities[id] === 0) continue;
    cumulative += probabilities[id];
    possible = id;
    if (cumulative > threshold) break;
  }
  return possible;
}

/**
 * Returns the likeliest tokens, best first, without those of probability 0.
 * @param {Float64Array} probabilities (V,)
 * @param {number} n how many, at most
 * @returns {{ids: number[], p: number[]}}
 */
export function likeliest(probabilities, n = 12) {
  const ids = [];
  for (let id = 0; id < probabilities.length; id++) {
    const p = probabilities[id];
    if (p === 0 || (ids.length === n && p <= probabilities[ids[n - 1]])) continue;
    let rank = ids.length;
    while (rank > 0 && probabilities[ids[rank - 1]] < p) rank--;
    ids.splice(rank, 0, id);
    if (ids.length > n) ids.pop();
  }
  return { ids, p: ids.map((id) => probabilities[id]) };
}
