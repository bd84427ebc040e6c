/** How many bytes the page may read. */

const MINUTE_MS = 60_000;
const MINUTE_BYTES = 180_000; // of all answers; with a look that is there early or late it is below 200 KB
const BURST_BYTES = 40_000; // of looks that follow each other at once, of a minute's bytes
const LOOKS_BYTES = 48_000; // of a minute, are never given to large answers
const MARGIN_BYTES = 10_000; // about one look, which comes early or late
// Of a minute, for large answers; one that is larger is paid for over as many minutes.
const LARGE_MOST_BYTES = MINUTE_BYTES - LOOKS_BYTES - 2 * MARGIN_BYTES;
const LOOK_PAUSE_MS = 15_000; // for bytes, at most; what has cost more is forgiven

/**
 * Bytes that may be read: in no minute more than MINUTE_BYTES and the last answer. Large answers are let in while what
 * the last minute has cost leaves room for them; looks share what is left of it. `clock`: of milliseconds.
 */
export class Budget {
  #clock;
  #spent = []; // { at, bytes, isLarge } of the last minute
  #left = BURST_BYTES; // for looks
  #at;
  #paidAt = 0; // when the large ones until now are paid for
  #awaited = 0; // bytes of a large answer that room is made for
  #look = 0; // bytes of the present turn
  #before = 0; // of the one before

  constructor(clock = Date.now) {
    this.#clock = clock;
    this.#at = clock();
  }

  /** A turn begins: who waits for room says so again. */
  begin() {
    this.#refill();
    this.#awaited = 0;
    [this.#before, this.#look] = [this.#look, 0];
  }

  /** An answer has come. */
  charge(bytes, isLarge = false) {
    this.#refill();
    this.#spent.push({ at: this.#at, bytes, isLarge });
    if (isLarge) return;
    this.#look += bytes;
    this.#left = Math.max((-LOOK_PAUSE_MS / 1_000) * this.#rate, this.#left - bytes);
  }

  /** No large answer for as long as one of this size has to be paid for; also where it was not of the budget. */
  defer(bytes) {
    this.#refill();
    this.#paidAt = Math.max(this.#paidAt, this.#at + (bytes / LARGE_MOST_BYTES) * MINUTE_MS);
  }

  /** Whether a large answer of this size may be asked for now. Where not, looks make room for it, if that can help. */
  hasRoom(bytes) {
    this.#refill();
    const isBeyond = bytes > LARGE_MOST_BYTES; // let in beside the fewest looks
    const others = isBeyond ? LOOKS_BYTES + MARGIN_BYTES : MINUTE_BYTES - bytes;
    if (this.#at >= this.#paidAt && this.#sum() <= others) return true;
    const wanted = Math.min(bytes, LARGE_MOST_BYTES);
    const isNear = this.#paidAt - this.#at <= MINUTE_MS;
    if (isNear && this.#large + wanted <= LARGE_MOST_BYTES) {
      this.#awaited = Math.max(this.#awaited, bytes + MARGIN_BYTES);
    }
    return false;
  }

  /** For how long nothing is looked at: until looks are paid for, and a minute has room for another one. */
  get pauseMs() {
    this.#refill();
    const paid = (-this.#left / this.#rate) * 1_000;
    let over = this.#sum() + Math.min(this.#look, this.#before) - MINUTE_BYTES;
    let free = this.#at;
    for (const { at, bytes } of this.#spent) {
      if (over <= 0) break;
      over -= bytes;
      free = at + MINUTE_MS;
    }
    return Math.min(LOOK_PAUSE_MS, Math.max(0, paid, free - this.#at));
  }

  /** Bytes per second for looks, beside large answers of the last minute and the one that is awaited. */
  get #rate() {
    const reserved = Math.max(BURST_BYTES, this.#large + this.#awaited);
    return (Math.max(LOOKS_BYTES, MINUTE_BYTES - reserved) / MINUTE_MS) * 1_000;
  }

  get #large() {
    return this.#sum(({ isLarge }) => isLarge);
  }

  /** Bytes of the last minute's answers. */
  #sum(isOne = () => true) {
    return this.#spent.filter(isOne).reduce((sum, { bytes }) => sum + bytes, 0);
  }

  #refill() {
    const now = this.#clock();
    this.#spent = this.#spent.filter(({ at }) => now - at < MINUTE_MS);
    const most = Math.max(0, BURST_BYTES - this.#large);
    this.#left = Math.min(most, this.#left + ((now - this.#at) / 1_000) * this.#rate);
    this.#at = now;
  }
}
