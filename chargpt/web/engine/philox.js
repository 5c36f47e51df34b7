// Random numbers by position: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
// as 1, 2, 3"). There is no state to carry, so any character of a text can be drawn again.

const MULTIPLIER_0 = 0xd2511f53n;
const MULTIPLIER_2 = 0xcd9e8d57n;
const KEY_STEP_0 = 0x9e3779b9n; // the golden ratio, as a fraction of 2³²
const KEY_STEP_1 = 0xbb67ae85n; // √3 − 1
const LOW_32 = 0xffffffffn;

/**
 * Scrambles a counter under a key, in ten rounds.
 * @param {bigint[]} counter four numbers of 32 bits
 * @param {bigint[]} key two numbers of 32 bits
 * @returns {bigint[]} four numbers of 32 bits
 */
export function philox([c0, c1, c2, c3], [k0, k1]) {
  for (let round = 0; round < 10; round++) {
    const from0 = c0 * MULTIPLIER_0; // 64 bits each
    const from2 = c2 * MULTIPLIER_2;
    [c0, c1] = [(from2 >> 32n) ^ c1 ^ k0, from2 & LOW_32];
    [c2, c3] = [(from0 >> 32n) ^ c3 ^ k1, from0 & LOW_32];
    k0 = (k0 + KEY_STEP_0) & LOW_32;
    k1 = (k1 + KEY_STEP_1) & LOW_32;
  }
  return [c0, c1, c2, c3];
}

/**
 * Returns a uniform number in [0, 1), a multiple of 2⁻⁵³.
 * @param {number} seed a whole number from 0 to 2⁵³ − 1
 * @param {number} index of the character to draw, from 0
 */
export function uniform(seed, index) {
  const key = BigInt(seed);
  const [high, low] = philox([BigInt(index), 0n, 0n, 0n], [key & LOW_32, key >> 32n]);
  return Number((high << 21n) | (low >> 11n)) / 2 ** 53; // 32 + 21 bits
}
