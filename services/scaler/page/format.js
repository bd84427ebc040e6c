/** Numbers in words. What is not known is a dash, never a zero. */

export const UNKNOWN = "–";

const isKnown = (value) => value !== null && value !== undefined && !Number.isNaN(value);

/** A number with at most three digits that count. */
export function number(value) {
  if (!isKnown(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size >= 1e9) return `${trim(value / 1e9)} G`;
  if (size >= 1e6) return `${trim(value / 1e6)} M`;
  if (size >= 1e4) return `${trim(value / 1e3)} k`;
  return Number.isInteger(value) ? String(value) : trim(value);
}

function trim(value) {
  return String(Number(value.toPrecision(3)));
}

/** Bytes by powers of 1024. */
export function bytes(value) {
  if (!isKnown(value)) return UNKNOWN;
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let n = 0;
  let size = value;
  while (Math.abs(size) >= 1024 && n < units.length - 1) {
    size /= 1024;
    n += 1;
  }
  return `${size >= 1000 ? Math.round(size) : trim(size)} ${units[n]}`;
}

/** Seconds, as milliseconds below one. */
export function seconds(value) {
  if (!isKnown(value)) return UNKNOWN;
  if (value === 0) return "0 s";
  if (Math.abs(value) < 1) return `${trim(value * 1e3)} ms`;
  if (value < 120) return `${trim(value)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 120
    ? `${minutes} min ${Math.round(value % 60)} s`
    : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** A share as a percentage. */
export function share(value) {
  return isKnown(value) ? `${trim(value * 100)} %` : UNKNOWN;
}

/** A share of an objective. */
export function ratio(value) {
  return isKnown(value) ? value.toFixed(2) : UNKNOWN;
}

/** A rate per second. */
export function rate(value) {
  return isKnown(value) ? `${number(value)}/s` : UNKNOWN;
}

/** A time of the clock, with the day where it is another one. */
export function clock(unix) {
  if (!isKnown(unix)) return UNKNOWN;
  const date = new Date(unix * 1000);
  const time = date.toLocaleTimeString([], { hour12: false });
  return date.toDateString() === new Date().toDateString() ? time : `${date.toLocaleDateString()} ${time}`;
}

/** `scale_up` as words. */
export function words(name) {
  return String(name).replaceAll("_", " ");
}

/** A count with its noun: `plural(1, "device")`. */
export function plural(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}
