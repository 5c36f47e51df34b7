// Does this browser compute what the model computed in Python? And how fast?

import { fromBase64 } from "./weights.js";

const SPEED_MS = 300; // time spent writing, to measure the speed
const SETTINGS = { temperature: 0.8, topK: 0, topP: 1, minP: 0, seed: 0 };

/**
 * @param {Reader} reader
 * @param {Writer} writer
 * @param {{prompts: number[][], logits: string, tolerance: number}} expected contexts, and the logits
 *   after each in Python, (prompts, V) of float32 in base64
 */
export async function selfTest(reader, writer, { prompts, logits, tolerance }) {
  const wanted = new Float32Array(fromBase64(logits).buffer);
  const worst = { difference: 0, prompt: 0, token: 0 };
  for (const [prompt, context] of prompts.entries()) {
    const computed = await reader.logits(context);
    computed.forEach((logit, token) => {
      const difference = Math.abs(logit - wanted[prompt * computed.length + token]);
      if (!(difference <= worst.difference)) Object.assign(worst, { difference, prompt, token }); // or NaN
    });
  }
  const passed = worst.difference <= tolerance;
  return {
    largestDifference: worst.difference,
    tolerance,
    passed,
    where: `prompt ${worst.prompt + 1} of ${prompts.length}, ${prompts[worst.prompt].length} tokens long, at token ${worst.token}`,
    charactersPerSecond: passed ? await speed(writer) : 0,
    backend: reader.model.backend,
  };
}

/** Returns how many characters the writer writes per second. */
async function speed(writer) {
  const start = performance.now();
  let [n, elapsed] = [0, 0];
  while (elapsed < SPEED_MS) {
    const ended = n; // a text may end: then the next one starts
    for await (const _ of writer.write({ ids: [], from: 0, n: 1000, settings: { ...SETTINGS, seed: ended } })) {
      n++;
      elapsed = performance.now() - start;
      if (elapsed >= SPEED_MS) break;
    }
    elapsed = performance.now() - start;
  }
  return (1000 * n) / elapsed;
}
