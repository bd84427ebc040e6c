/** The admin token, for as long as the tab lives: in the session's storage, never in an address. */

const TOKEN = "elasticmoe.token";
const THEME = "elasticmoe.theme";

/** Take the token out of the address's fragment, where `elasticmoe up` puts it; no server and no history sees it. */
export function takeTokenFromAddress() {
  const found = /^#token=([!-~]+)$/.exec(location.hash);
  if (found === null) return;
  sessionStorage.setItem(TOKEN, decodeURIComponent(found[1]));
  history.replaceState(null, "", `${location.pathname}#/now`);
}

export const token = () => sessionStorage.getItem(TOKEN) ?? "";
export const keepToken = (text) => sessionStorage.setItem(TOKEN, text);
export const dropToken = () => sessionStorage.removeItem(TOKEN);

/** `light`, `dark`, or `auto`: as the system has it. */
export const theme = () => localStorage.getItem(THEME) ?? "auto";

/** Show the page in another theme from now on. */
export function useTheme(name) {
  localStorage.setItem(THEME, name);
  document.documentElement.dataset.theme = name;
}
