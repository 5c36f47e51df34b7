// Random numbers by position: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
// 1, 2, 3"). There is no state to carry, so any character of a text can be drawn again.

const MULTIPLIERS = [0xd2511f53n, 0xcd9e8d57n];
const KEY_STEPS = [0x9e3779b9n, 0xbb67ae85n]; // the golden ratio and √3 − 1, as fractions of 2³²
const LOW_32 = 0xffffffffn;

/**
 * Scrambles a counter under a key, in ten rounds.
 * @param {bigint[]} counter four numbers of 32 bits
 * @param {bigint[]} key two numbers of 32 bits
 * @returns {bigint[]} four numbers of 32 bits
 */
export function philox([c0, c1, c2, c3], [k0, k1]) {
  for (let round = 0; round < 10; round++) {
    const first = c0 * MULTIPLIERS[0];
    const second = c2 * MULTIPLIERS[1];
    [c0, c1, c2, c3] = [(second >> 32n) ^ c1 ^ k0, second & LOW_32, (first >> 32n) ^ c3 ^ k1, first & LOW_32];
    k0 = (k0 + KEY_STEPS[0]) & LOW_32;
    k1 = (k1 + KEY_STEPS[1]) & LOW_32;
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
